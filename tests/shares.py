"""What tests and benchmarks ask of a compile: the meshes, the reference, errors, collectives, and what was divided."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

import inputs as fixtures

from onnxmesh.compiler import cost
from onnxmesh.compiler.api import Compilation, compile_model
from onnxmesh.compiler.errors import ShardingError
from onnxmesh.compiler.options import CpStrategy, Options, Precision
from onnxmesh.compiler.verification import reference as run_reference
from onnxmesh.passes.place.place import Placed
from onnxmesh.passes.place.roles import CONTRACTIONS, weight_ports
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Shard
from onnxmesh.runtime.plan import Collective, Plan
from onnxmesh.runtime.session import Session

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
STRATEGIES: tuple[CpStrategy, ...] = ("allgather", "ulysses", "ring")


@dataclass(frozen=True)
class Case:
    """A mesh with a strategy, and its name in tables and goldens."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    strategy: CpStrategy = "auto"

    @property
    def name(self) -> str:
        """`tp2 x cp2`, `cp4 ring`."""
        sizes = (("dp", self.dp), ("tp", self.tp), ("cp", self.cp))
        mesh = " x ".join(f"{axis}{size}" for axis, size in sizes if size > 1)
        return mesh if self.strategy == "auto" else f"{mesh} {self.strategy}"

    @property
    def mesh(self) -> Mesh:
        return Mesh.of(tp=self.tp, cp=self.cp, dp=self.dp)


CASES: tuple[Case, ...] = (
    Case(tp=2),
    Case(tp=4),
    *(Case(cp=ranks, strategy=strategy) for ranks in (2, 4) for strategy in STRATEGIES),
    Case(dp=2),
    Case(tp=2, cp=2),
)


def compile_fixture(name: str, case: Case, *, odd: bool = False, precision: Precision = "model") -> Compilation:
    """The fixture compiled for one case. Raises ShardingError where it is refused."""
    fixture = fixtures.load(name)
    options = Options(case.mesh, {}, fixture.bindings(odd), case.strategy, precision=precision)
    return compile_model(str(fixture.path), options)


def try_compile(
    name: str, case: Case, *, odd: bool = False, precision: Precision = "model"
) -> Compilation | ShardingError:
    """The fixture compiled, or why it was refused."""
    try:
        return compile_fixture(name, case, odd=odd, precision=precision)
    except ShardingError as error:
        return error


def plan_of(state: Compilation) -> Plan:
    """The plan of a compile that went through."""
    assert state.plan is not None
    return state.plan


# --- numbers ------------------------------------------------------------------------------------------------


@cache
def reference(name: str, odd: bool = False) -> dict[str, np.ndarray]:
    """The outputs of the whole model: ONNX Runtime's, or, where it cannot run the model, onnx.reference's."""
    fixture = fixtures.load(name)
    used, outputs = run_reference(fixture.path, fixture.make_inputs(odd=odd))
    assert used.startswith("ONNX Runtime") == fixture.runs_in_ort, used
    return outputs


def run_fixture(plan: Plan, name: str, *, odd: bool = False) -> dict[str, np.ndarray]:
    """The outputs of a plan by name, on local ranks."""
    feeds = fixtures.load(name).make_inputs(odd=odd)
    with Session(plan) as session:
        return dict(zip([port.name for port in session.get_outputs()], session.run(None, feeds)))


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of the reference; infinite where NaNs are in other places."""
    if ours.shape != expected.shape:
        return float("inf")
    a, b = (np.asarray(x, np.float64) for x in (ours, expected))
    if not (np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(a[np.isinf(a)], b[np.isinf(b)])):
        return float("inf")
    finite = np.isfinite(b)
    scale = float(np.linalg.norm(b[finite]))
    difference = float(np.linalg.norm(a[finite] - b[finite]))
    return difference / scale if scale else difference


def worst_error(plan: Plan, name: str, *, odd: bool = False) -> float:
    """The largest relative error among a plan's outputs."""
    outputs, expected = run_fixture(plan, name, odd=odd), reference(name, odd)
    assert set(outputs) == set(expected)
    return max(relative_error(outputs[key], expected[key]) for key in expected)


# --- what is sent -------------------------------------------------------------------------------------------


def collectives(plan: Plan) -> list[Collective]:
    """Every collective of the program, in order."""
    return [item for item in plan.programs[0].instructions if isinstance(item, Collective)]


def counts(plan: Plan) -> dict[str, int]:
    """How many arrays a rank exchanges: `cp AllGather` -> number. Which are sent together hangs on predicted times."""
    sent = Counter(f"{item.axis} {item.kind}" for item in collectives(plan) for _ in item.ins)
    return dict(sorted(sent.items()))


# --- what is divided ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """What one axis divides, as fractions of the graph that it found.

    Attributes:
        flops, weights: the part that belongs to nodes, or linear weights, which the axis's ranks divide.
        flops_per_rank, weights_per_rank: the part that one rank has in the end.
    """

    axis: str
    ranks: int
    flops: float
    flops_per_rank: float
    weights: float
    weights_per_rank: float


def shares(placed: Placed) -> Shares:
    """What an axis's choice divides."""
    flops, mine, divided = _sums(_flops(placed))
    weights, ours, cut = _sums(_weights(placed))
    return Shares(
        placed.axis,
        placed.ranks,
        divided / flops if flops else 0.0,
        mine / flops if flops else 1.0,
        cut / weights if weights else 0.0,
        ours / weights if weights else 1.0,
    )


def _sums(pairs: Iterator[tuple[float, float]]) -> tuple[float, float, float]:
    """Of (whole, one rank's) amounts: all, one rank's, and what belongs to amounts that are divided."""
    amounts = list(pairs)
    whole, mine = (sum(column) for column in zip(*amounts)) if amounts else (0.0, 0.0)
    return whole, mine, sum(full for full, local in amounts if local < full)


def _flops(placed: Placed) -> Iterator[tuple[float, float]]:
    for node, view in placed.views.items():
        yield cost.flops(view), cost.strategy_flops(view, placed.strategies[node])


def _weights(placed: Placed) -> Iterator[tuple[float, float]]:
    """Bytes of every linear layer's weight, and of one rank's part. A weight that two nodes share counts twice."""
    for node, view in placed.views.items():
        if view.op not in CONTRACTIONS:
            continue
        for i in weight_ports(view):
            shape, placement = view.ins[i], placed.strategies[node].ins[i]
            size = prod(shape or ()) * itemsize(view.in_dtypes[i])
            part = placement.local(placed.ranks) / placement.size if isinstance(placement, Shard) else 1.0
            yield size, size * part


def itemsize(dtype: str) -> int:
    """Bytes of an element of a dtype by name."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def total_weight_share(placed: Sequence[Placed]) -> float:
    """One rank's part of the linear weights after all axes."""
    return prod(shares(item).weights_per_rank for item in placed)
