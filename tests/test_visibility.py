"""Which keys queries see: from positions and masks to runs of queries."""

from __future__ import annotations

import numpy as np
import pytest

from onnxmesh.runtime.cuda.visibility import Run, runs, seen_by_mask, seen_by_position


def of(q_pos: object, k_pos: object) -> tuple[Run, ...] | None:
    seen = seen_by_position(np.asarray(q_pos), np.asarray(k_pos))
    return None if seen is None else runs(seen)


def test_all_keys_are_seen() -> None:
    assert of(np.arange(8, 12), np.arange(8)) == (Run(0, 4, 8),)


def test_all_keys_are_seen_in_any_order() -> None:
    assert of([9, 7, 8], [3, 1, 2]) == (Run(0, 3, 3),)


def test_no_key_is_seen() -> None:
    assert of(np.arange(4), np.arange(8, 16)) == (Run(0, 4, 0),)


def test_causal() -> None:
    assert of(np.arange(6), np.arange(6)) == (Run(0, 6, 6, True),)


def test_causal_within_the_keys_of_all_ranks() -> None:
    """Rows 4 to 7 of 16: the keys behind them are left out."""
    assert of(np.arange(4, 8), np.arange(16)) == (Run(0, 4, 8, True),)


def test_causal_after_a_past() -> None:
    assert of(np.arange(10, 13), np.arange(13)) == (Run(0, 3, 13, True),)


def test_the_first_rows_see_nothing() -> None:
    assert of(np.arange(-2, 3), np.arange(5)) == (Run(0, 2, 0), Run(2, 5, 3, True))


def test_the_last_rows_see_all() -> None:
    assert of(np.arange(6), np.arange(3)) == (Run(0, 3, 3, True), Run(3, 6, 3))


def test_two_segments_of_a_sequence() -> None:
    """Rank 1 of 2 holds its half of two segments; so do its keys."""
    part = np.r_[2:4, 8:12]
    assert of(part, part) == (Run(0, 6, 6, True),)
    assert of(part, np.r_[0:2, 4:8]) == (Run(0, 2, 2), Run(2, 6, 6))
    assert of(np.r_[0:2, 4:8], part) == (Run(0, 2, 0), Run(2, 6, 2))


def test_another_order_of_tokens_is_no_run() -> None:
    assert of(np.arange(8), np.arange(8)[::-1]) is None


def test_too_many_runs() -> None:
    assert runs(np.array([3, 1, 3, 1, 3, 1])) is None


def test_masks() -> None:
    causal = np.tri(5, dtype=bool)
    seen = seen_by_mask(causal)
    assert seen is not None
    assert runs(seen) == (Run(0, 5, 5, True),)
    assert seen_by_mask(causal[:, ::-1]) is None


def test_nothing_at_all() -> None:
    assert of(np.zeros(0, int), np.arange(3)) == ()
    assert of(np.arange(2), np.zeros(0, int)) == (Run(0, 2, 0),)


@pytest.mark.parametrize("seed", range(40))
def test_runs_say_what_positions_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    s, t = rng.integers(1, 9, 2)
    q_pos = rng.integers(-2, 10) + np.arange(s) if seed % 2 else rng.integers(0, 6, s)
    k_pos = np.sort(rng.integers(0, 8, t)) if seed % 3 else np.arange(t)
    seen = seen_by_position(q_pos, k_pos)
    assert seen is not None
    visible = k_pos[None] <= q_pos[:, None]
    found = runs(seen, most=99)
    assert found is not None
    got = np.zeros((s, t), bool)
    for run in found:
        last = run.keys - run.rows + 1 + np.arange(run.rows) if run.causal else np.full(run.rows, run.keys)
        got[run.start : run.stop] = np.arange(t)[None] < last[:, None]
        assert not run.causal or last[0] > 0
    np.testing.assert_array_equal(got, visible)
