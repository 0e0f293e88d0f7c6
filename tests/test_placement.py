"""Placements: what a rank holds, how the pieces come together again, and how placements are written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime.placement import (
    Partial,
    Placement,
    R,
    Replicate,
    Segment,
    Shard,
    cut,
    from_json,
    join,
    local_shape,
    ranges,
    text,
    to_json,
)

RANKS = 4
X = np.arange(24).reshape(2, 12)
SHARDS = {
    "S(1)": Shard(1, (Segment(12),)),
    "S(1; 8,4)": Shard(1, (Segment(8), Segment(4))),
    "S(1; 4*,8)": Shard(1, (Segment(4, 4), Segment(8))),
    "S(1; 12~2)": Shard(1, (Segment(12, 2),)),
    "S(1; 4,2*,6~2)": Shard(1, (Segment(4), Segment(2, 4), Segment(6, 2))),
    "S(0; 2~2)": Shard(0, (Segment(2, 2),)),
}
PLACEMENTS: dict[str, Placement] = {
    "R": R,
    "P": Partial(),
    "P(max)": Partial("max"),
    "P(min)": Partial("min"),
    **SHARDS,
}


def pieces(x: np.ndarray, placement: Placement) -> list[np.ndarray]:
    return [cut(x, placement, RANKS, rank, np) for rank in range(RANKS)]


def held(placement: Shard) -> list[list[int]]:
    """The positions along the dim that every rank holds."""
    return [piece.tolist() for piece in pieces(np.arange(placement.size), placement.moved(0))]


def test_a_plain_shard_gives_each_rank_its_run() -> None:
    assert held(Shard.plain(0, 8)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_rank_has_its_part_of_every_segment() -> None:
    assert held(Shard(0, (Segment(4), Segment(8)))) == [[0, 4, 5], [1, 6, 7], [2, 8, 9], [3, 10, 11]]


def test_a_whole_segment_is_on_every_rank() -> None:
    assert held(Shard(0, (Segment(2, 4), Segment(4)))) == [[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]]


def test_neighbours_hold_the_same_part_of_a_segment_with_copies() -> None:
    assert held(Shard(0, (Segment(6, 2),))) == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


def test_ranges_are_runs_of_the_global_dim_in_local_order() -> None:
    assert ranges((Segment(8), Segment(3, 4), Segment(6, 2)), RANKS, 2) == [(4, 6), (8, 11), (14, 17)]


@pytest.mark.parametrize("name", SHARDS)
def test_ranges_are_what_cut_takes(name: str) -> None:
    placement = SHARDS[name]
    for rank, positions in enumerate(held(placement)):
        assert positions == [i for run in ranges(placement.segments, RANKS, rank) for i in range(*run)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_join_is_the_inverse_of_cut(name: str, dtype: str) -> None:
    x = (X % 2 if dtype == "bool" else X).astype(getattr(ml_dtypes, dtype, dtype))
    if name == "P" and dtype == "bool":
        pytest.skip("bools have no sum")
    parts = pieces(x, PLACEMENTS[name])
    whole = join(parts, PLACEMENTS[name], np)
    assert whole.dtype == x.dtype
    np.testing.assert_array_equal(whole, x)
    assert {part.shape for part in parts} == {local_shape(X.shape, PLACEMENTS[name], RANKS)}


@pytest.mark.parametrize(("op", "want"), [("sum", 6), ("max", 3), ("min", 0)])
def test_a_partial_is_the_reduction_over_the_ranks(op: str, want: int) -> None:
    assert join([np.array([rank]) for rank in range(RANKS)], Partial(op), np).tolist() == [want]


def test_rank_0_holds_a_constant_that_is_partial() -> None:
    assert [int(piece[0, 1]) for piece in pieces(X, Partial())] == [1, 0, 0, 0]


def test_once_leaves_a_part_to_the_first_rank_that_holds_it() -> None:
    parts = pieces(np.ones(9), Shard(0, (Segment(1, 4), Segment(4), Segment(4, 2)), once=True))
    assert [part.tolist() for part in parts] == [[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert sum(part.sum() for part in parts) == 9


def test_replicated_and_plain_pieces_are_views() -> None:
    assert cut(X, R, RANKS, 1, np) is X
    assert np.shares_memory(cut(X, SHARDS["S(1)"], RANKS, 1, np), X)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placements_read_as_in_the_documents(name: str) -> None:
    assert text(PLACEMENTS[name], RANKS) == name


def test_once_is_marked() -> None:
    assert text(Shard(0, (Segment(8),), once=True), RANKS) == "S(0!)"
    assert text(Shard(0, (Segment(2, 4), Segment(8)), once=True), RANKS) == "S(0!; 2*,8)"


@pytest.mark.parametrize("placement", [*PLACEMENTS.values(), Shard(1, (Segment(6, 2),), once=True)], ids=str)
def test_json_keeps_a_placement(placement: Placement) -> None:
    assert from_json(to_json(placement)) == placement


def test_json_is_small() -> None:
    assert to_json(R) == "R"
    assert to_json(Partial("max")) == {"partial": "max"}
    assert to_json(SHARDS["S(1; 4*,8)"]) == {"dim": 1, "segments": [[4, 4], [8, 1]]}


@pytest.mark.parametrize(
    "data",
    [
        None, "P", 3, [], {}, {"partial": "mean"}, {"partial": []}, {"dim": 0}, {"segments": []},
        {"dim": 0, "segments": [4]}, {"dim": "x", "segments": []}, {"dim": 0, "segments": [[1, 2, 3]]},
        {"dim": 0, "segments": [["4", None]]}, {"dim": [], "segments": []},
    ],
    ids=str,
)  # fmt: skip
def test_other_json_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not a placement"):
        from_json(data)


def test_segments_know_their_sizes() -> None:
    segment = Segment(6, 2)
    assert (segment.parts(RANKS), segment.local(RANKS)) == (2, 3)
    assert segment.fits(RANKS)
    assert not Segment(6).fits(RANKS)
    assert not Segment(6, 3).fits(RANKS)
    assert not Segment(0).fits(RANKS)


def test_a_shard_fits_where_something_is_cut() -> None:
    assert SHARDS["S(1; 4,2*,6~2)"].fits(RANKS)
    assert not Shard(0, (Segment(3, 4), Segment(2, 4))).fits(RANKS)
    assert not Shard(0, (Segment(8), Segment(3))).fits(RANKS)


def test_segments_make_different_placements() -> None:
    assert Shard(0, (Segment(8),)) != Shard(0, (Segment(4), Segment(4)))
    assert Shard.plain(0, 8) == Shard(0, (Segment(8),)) != Shard.plain(1, 8)
    assert Replicate() == R
    assert len({Partial(), Partial("sum"), Partial("max")}) == 2
