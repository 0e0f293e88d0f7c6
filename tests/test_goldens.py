"""The golden counts of collectives read well: what each mesh may send at all.

tests/test_fixtures.py compares every compile with the counts; here the counts themselves are judged.
"""

from __future__ import annotations

from collections import Counter

import pytest
from goldens import case_named, load
from shares import CASES, fixtures

COUNTED = [(name, case, counts) for name, cases in load().items() for case, counts in cases.items()]
ACCEPTED = [(name, case, counts) for name, case, counts in COUNTED if isinstance(counts, dict)]
TRANSFORMERS = [name for name in fixtures.names() if fixtures.load(name).has_self_attention]
ONE_TOKEN = ("llama_decode", "llama_grow")


def kinds(counts: dict[str, int]) -> Counter[str]:
    """Counts by kind alone."""
    total: Counter[str] = Counter()
    for key, number in counts.items():
        total[key.split()[1]] += number
    return total


def test_there_is_a_golden_for_every_fixture_and_mesh() -> None:
    assert {name: set(cases) for name, cases in load().items()} == {
        name: {case.name for case in CASES} for name in fixtures.names()
    }


def test_only_what_cannot_be_sharded_is_refused() -> None:
    refused = {(name, case) for name, case, counts in COUNTED if isinstance(counts, str)}
    no_sequence = {(name, case.name) for name in ("mlp_op18", "mlp_op23") for case in CASES if case.cp > 1}
    one_token = {
        (name, case.name)
        for name in TRANSFORMERS
        for case in CASES
        if name.startswith(ONE_TOKEN) and case.strategy in ("allgather", "ring")
    }
    assert refused == no_sequence | one_token


@pytest.mark.parametrize("name", fixtures.names())
def test_a_refusal_names_the_axis_and_says_why(name: str) -> None:
    for case, golden in load()[name].items():
        if isinstance(golden, str):
            ranks = case_named(case).cp
            assert golden.startswith(f"nothing could be sharded on cp={ranks}: ")
            assert "no attention" in golden or "has no cut as" in golden


@pytest.mark.parametrize(("name", "case", "counts"), ACCEPTED, ids=lambda x: str(x) if isinstance(x, str) else "")
def test_collectives_run_on_the_axes_of_the_mesh(name: str, case: str, counts: dict[str, int]) -> None:
    assert {key.split()[0] for key in counts} <= {axis[:2] for axis in case.split()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_self_attention_sends_as_its_strategy_says(name: str) -> None:
    """Ring shifts, ulysses exchanges; a cross-attention is free to choose."""
    for case, counts in load()[name].items():
        if isinstance(counts, dict) and case.endswith("ring"):
            assert kinds(counts)["Shift"] and kinds(counts)["Shift"] % (case_named(case).cp - 1) == 0
        if isinstance(counts, dict) and case.endswith("ulysses") and not name.startswith(ONE_TOKEN):
            assert kinds(counts)["AllToAll"]
        if case.endswith(("allgather", "ulysses")) and isinstance(counts, dict) and not has_cross_attention(name):
            assert not kinds(counts)["Shift"]


def has_cross_attention(name: str) -> bool:
    return fixtures.load(name).model in ("ltx", "t5", "wan", "whisper")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_data_parallel_ranks_only_gather_their_outputs(name: str) -> None:
    """CLIP also gathers what it looks up by (sample, place) pairs: the last token of each text."""
    counts, model = load()[name]["dp2"], fixtures.load(name)
    assert isinstance(counts, dict)
    assert set(counts) <= {"dp AllGather"}
    assert counts.get("dp AllGather", 0) <= len(model.outputs) + (model.model == "clip")
