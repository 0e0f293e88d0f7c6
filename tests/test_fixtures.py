"""Every fixture on every mesh: right, as good as its golden, and divided as far as its heads divide."""

from __future__ import annotations

from collections.abc import Iterator

import goldens
import pytest
import shares
from shares import CASES, TOLERANCE, Case, Shares, fixtures

from onnxmesh.compiler.api import Compilation
from onnxmesh.compiler.errors import ShardingError
from onnxmesh.passes.place.place import Placed

LEAST_SHARDED, SLACK = 0.9, 0.05

ODD_CASES = (
    Case(tp=2),
    *(case for case in CASES if case.cp == 2 and case.strategy != "auto"),
    Case(cp=4),
    Case(dp=2),
    Case(tp=2, cp=2),
)
ODD = [name for name in fixtures.names() if fixtures.load(name).odd]

# Where an axis divides less than its heads promise, and why, by (model, axis).
UNDIVIDED: dict[tuple[str, str], str] = {
    ("llama_decode", "cp"): "one new token is no sequence: only attention, over the past, is divided",
    ("llama_grow", "cp"): "one new token is no sequence: only attention, over the past, is divided",
    ("whisper", "cp"): "the windows of its convolutions overlap, so they run whole",
}


def pairs(names: list[str], cases: tuple[Case, ...]) -> Iterator[object]:
    for name in names:
        for case in cases:
            yield pytest.param(name, case, id=f"{name}-{case.name.replace(' ', '-')}")


@pytest.mark.parametrize(("name", "case"), pairs(fixtures.names(), CASES))
def test_a_fixture_on_a_mesh(name: str, case: Case) -> None:
    """One compile, and all that it must show."""
    result = shares.try_compile(name, case)
    assert goldens.golden_of(result) == goldens.load()[name][case.name], "see tests/goldens.py for how to update"
    if not isinstance(result, ShardingError):
        assert_right(result, name)
        for placed in result.placed:
            assert_divided(placed, name)


@pytest.mark.parametrize(("name", "case"), pairs(ODD, ODD_CASES))
def test_odd_sizes_are_right_or_refused(name: str, case: Case) -> None:
    result = shares.try_compile(name, case, odd=True)
    if isinstance(result, ShardingError):
        assert name.startswith(("mlp", "llama_grow")) and case.cp > 1
    else:
        assert_right(result, name, odd=True)


def assert_right(state: Compilation, name: str, odd: bool = False) -> None:
    error = shares.worst_error(shares.plan_of(state), name, odd=odd)
    assert error <= TOLERANCE[fixtures.load(name).dtype]


def assert_divided(placed: Placed, name: str) -> None:
    fixture, ranks = fixtures.load(name), placed.ranks
    if not fixture.has_self_attention or fixture.heads % ranks or fixture.kv_heads % ranks:
        return
    found = shares.shares(placed)
    assert is_divided(found) == (undivided(fixture.model, found) is None), found


def is_divided(found: Shares) -> bool:
    """Whether at least 90 % is sharded and a rank has its part of it; on tp of the linear weights too."""
    most = 1.0 / found.ranks + SLACK
    flops = found.flops >= LEAST_SHARDED and found.flops_per_rank <= most
    weights = found.weights >= LEAST_SHARDED and found.weights_per_rank <= most
    return flops and (weights or found.axis != "tp")


def undivided(model: str, found: Shares) -> str | None:
    """Why an axis is known to divide less of a model."""
    return UNDIVIDED.get((model, found.axis))
