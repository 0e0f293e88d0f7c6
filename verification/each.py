"""Run a plan and compare every tensor as it goes: the ranks wait after an instruction while its results are checked.

Nothing is collected: what is compared is read in the ranks' own memory, where it still is; only what is overwritten
before its last use is kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxmesh.compiler.errors import VerificationError
from onnxmesh.runtime.bound_values import bound_values
from onnxmesh.runtime.dtypes import is_narrow
from onnxmesh.runtime.engine import Hook
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.placement import Replicate, text
from onnxmesh.runtime.plan import Instruction, Launch, Plan
from onnxmesh.runtime.recipe import Fetch
from onnxmesh.runtime.session import Session
from onnxmesh.runtime.views import cut_view, join_views
from onnxmesh.verification.correspondence import Check, Schedule, Tensor, global_index, schedule
from onnxmesh.verification.model import Arrays, Model, Path
from onnxmesh.verification.oracle import Oracle
from onnxmesh.verification.rounding import Judgement, Spread, allowed, judge, scale, unit_roundoff

DAY = 86400.0
"""Seconds that ranks wait for each other: as long as a check takes."""


@dataclass(frozen=True)
class Compared:
    """A tensor that was compared.

    Attributes:
        name: the model's name of the value; one may be held in several forms, each with its placement.
        node: the model's node that makes it.
        kernel, instruction: what made it in the plan.
        worst: the largest share of what is allowed that an element is off; more than 1 is wrong.
        error: the largest difference.
        wrong: elements that are wrong, of all ranks' pieces.
        exact: whether float64 was asked.
    """

    name: str
    node: str
    op: str
    kernel: str
    instruction: int
    dtype: str
    shape: tuple[int, ...]
    placement: Mapping[str, str]
    worst: float
    error: float
    wrong: int
    exact: bool


@dataclass(frozen=True)
class Difference:
    """The first wrong element of a tensor, and everything to tell why.

    Attributes:
        ranks: whose piece holds it; several whose shares were added.
        local_index: in the piece of the first of them.
        float64: what onnx.reference gives in float64, where it can.
        allowed: how far from that, or from the reference, it may be.
        arrays: the pieces of all ranks, the reference's result, float64's, and the inputs of the segment.
    """

    compared: Compared
    ranks: tuple[int, ...]
    index: tuple[int, ...]
    local_index: tuple[int, ...]
    ours: Any
    reference: Any
    float64: Any
    allowed: float
    check: Check
    arrays: Arrays = field(repr=False, default_factory=dict)


@dataclass
class Examination:
    """What came of comparing every tensor.

    Attributes:
        differences: of every wrong tensor, in the order of the run; only the first has arrays.
        skipped: the model's values that were not compared, and why.
        references: how many segments each reference computed.
        exact: how many were computed in float64 too.
    """

    compared: list[Compared] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    references: Mapping[str, int] = field(default_factory=dict)
    exact: int = 0
    seconds: float = 0.0

    @property
    def reasons(self) -> Counter[str]:
        """How many values were not compared, by reason."""
        return Counter(self.skipped.values())

    def check(self) -> None:
        """Raise VerificationError if a tensor is wrong; it names the first, its node and rank."""
        if self.differences:
            first = self.differences[0]
            ranks = " and ".join(map(str, first.ranks))
            raise VerificationError(
                f"{len(self.differences)} of {len(self.compared)} tensors are wrong; the first is "
                f"{first.compared.name!r} of node {first.compared.node!r} on rank {ranks}, element "
                f"{list(first.index)}: {first.ours!s}, the reference has {first.reference!s}"
            )


def examine(
    plan: Plan, model: Model | Path, feeds: Arrays, *, weights: Fetch | Path | None = None, device: str = "cpu"
) -> Examination:
    """Run `plan` and compare every tensor of it with what the nodes of `model` make of the tensors before.

    Args:
        feeds: the plan's inputs, by name.
        weights: where the plan's weights are, if not where it came from.
        device: `cpu`; or `cuda` for a plan of one rank.

    Raises:
        VerificationError: the plan does not know what it holds, or is of another model.
        RunError: the run failed.
    """
    model = model if isinstance(model, Model) else Model(model)
    begin = time.perf_counter()
    work = _Work(plan, model, schedule(plan, model), {**bound_values(plan.programs[0]), **feeds})
    source = weights if weights is None or callable(weights) else str(weights)
    with Session(plan, device, weights=source, timeout=DAY, hooks=work.hook) as session:
        if not session.engines:
            raise RunError("ranks on several GPUs cannot be compared tensor by tensor", hint="leave out --each")
        work.session = session
        session.run(None, session.check(feeds))
    result = work.result
    result.skipped = work.schedule.skipped | result.skipped
    result.references, result.exact = work.oracle.used, work.oracle.exact
    result.seconds = time.perf_counter() - begin
    return result


class _Work:
    """A run that is being compared."""

    def __init__(self, plan: Plan, model: Model, schedule: Schedule, feeds: Arrays) -> None:
        self.plan, self.model, self.schedule, self.feeds = plan, model, schedule, feeds
        self.oracle = Oracle(model)
        self.result = Examination()
        self.session: Session | None = None
        self.kept: dict[int, np.ndarray] = {}
        self.widened = plan.report.get("precision", {}).get("asked", "model") != "model"

    def hook(self, rank: int) -> Hook:
        """What a rank does after every instruction: where there is something to check, all wait for rank 0 to do it."""

        def after(index: int, item: Instruction, _: Sequence[Any]) -> None:
            if index in self.schedule.checks and self.session is not None:
                comm = self.session.engines[rank].communicator
                comm.barrier()
                if rank == 0:
                    for check in self.schedule.checks[index]:
                        self._check(check, item)
                comm.barrier()

        return after

    def _check(self, check: Check, item: Instruction) -> None:
        tensor, segment = check.tensor, check.segment
        if self.model.is_random(segment):
            self.result.skipped[tensor.name] = "random numbers"
        else:
            try:
                self._compare(check, item)
            except VerificationError as error:
                self.result.skipped[tensor.name] = str(error.args[0])
        if tensor.number in self.schedule.keep:
            self.kept[tensor.number] = np.array(self._whole(tensor))
        for number in [n for n in self.kept if self.schedule.keep[n] <= tensor.number]:
            del self.kept[number]

    def _compare(self, check: Check, item: Instruction) -> None:
        tensor, segment = check.tensor, check.segment
        values = {name: self._value(name, anchor) for name, anchor in check.anchors.items()}
        expected = self.oracle.run(segment, values)[tensor.name] if segment.nodes else values[tensor.name]
        if tuple(expected.shape) != tensor.shape:
            raise VerificationError(f"its shape is {list(tensor.shape)}, the model's {list(expected.shape)}")
        pieces = dict(self._pieces(tensor))
        unit = max(unit_roundoff(x.dtype) for x in (expected, *values.values(), *pieces.values()))
        bound = self.oracle.bound(segment, values, unit, tensor.name)
        size = scale(expected)
        judged = {rank: self._judge(x, tensor, rank, expected, size, bound, None) for rank, x in pieces.items()}
        spread = None
        if any(item.wrong for item in judged.values()) and segment.nodes:
            spread = self._spread(segment, values, expected, tensor.name, bound.relative)
            if spread is not None:
                size = scale(spread.exact)
                judged = {r: self._judge(x, tensor, r, expected, size, bound, spread) for r, x in pieces.items()}
        compared = self._compared(tensor, item, pieces[0], judged.values(), spread is not None)
        self.result.compared.append(compared)
        if compared.wrong:
            self._differ(check, compared, pieces, expected, values, size, bound, judged, spread)

    def _judge(
        self, piece: np.ndarray, tensor: Tensor, rank: int, expected: np.ndarray, size: np.ndarray, bound: Any,
        spread: Spread | None,
    ) -> Judgement:  # fmt: skip
        if spread is not None:
            spread = Spread(self._cut(spread.exact, tensor, rank), self._cut(spread.slack, tensor, rank))
        return judge(piece, self._cut(expected, tensor, rank), self._cut(size, tensor, rank), bound, spread)

    def _spread(self, segment: Any, values: Arrays, expected: np.ndarray, name: str, change: float) -> Spread | None:
        """What float64 says; None where nothing computes the segment in it."""
        try:
            runs = self.oracle.run_exactly(segment, values, change)
            return Spread.of(next(runs)[name], expected, (run[name] for run in runs))
        except VerificationError:
            return None

    def _differ(
        self, check: Check, compared: Compared, pieces: Arrays | dict[int, np.ndarray], expected: np.ndarray,
        values: Arrays, size: np.ndarray, bound: Any, judged: Mapping[int, Judgement], spread: Spread | None,
    ) -> None:  # fmt: skip
        """Note the first wrong element."""
        tensor, mesh = check.tensor, self.plan.mesh
        found = []
        for rank, judgement in judged.items():
            if judgement.wrong:
                local = tuple(map(int, np.unravel_index(judgement.first, pieces[rank].shape)))
                found.append((global_index(local, tensor, mesh, rank), rank, local))
        index, rank, local = min(found)
        exact = spread.exact[index] if spread is not None else None
        slack = float(spread.slack[index]) if spread is not None else 0.0
        limit = allowed(float(np.abs(exact if exact is not None else expected[index])), float(size[index]), slack, bound)
        arrays: dict[str, np.ndarray] = {}
        if not self.result.differences:
            arrays |= {f"ours.rank{rank}": np.array(x) for rank, x in self._own(tensor)}
            arrays |= {"reference": np.array(expected)} | ({"float64": spread.exact} if spread is not None else {})
            arrays |= {f"input.{name}": np.array(x) for name, x in values.items()}
        ranks = mesh.group(rank, tensor.partial_axes) if tensor.partial_axes else (rank,)
        ours = pieces[rank][local]
        self.result.differences.append(
            Difference(compared, ranks, index, local, ours, expected[index], exact, limit, check, arrays)
        )

    def _compared(
        self, tensor: Tensor, item: Instruction, piece: np.ndarray, judged: Any, exact: bool
    ) -> Compared:
        judged = list(judged)
        number = self.model.producer(tensor.name)
        placement = {a: text(p, self.plan.mesh.axis_size(a)) for a, p in tensor.spec if not isinstance(p, Replicate)}
        return Compared(
            tensor.name,
            self.model.label(number) if number is not None else "an input",
            self.model.op(number) if number is not None else "",
            item.kernel if isinstance(item, Launch) else item.kind,
            tensor.ready,
            piece.dtype.name,
            tensor.shape,
            placement,
            max(judgement.worst for judgement in judged),
            max(judgement.largest for judgement in judged),
            sum(judgement.wrong for judgement in judged),
            exact,
        )

    # --- the ranks' memory --------------------------------------------------------------------------------------

    def _own(self, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """What every rank holds."""
        assert self.session is not None
        for rank, engine in self.session.engines.items():
            yield rank, self.session.device.get(engine.array(tensor.buffer))

    def _pieces(self, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """What every rank holds; where ranks hold shares of a sum, their sum, of the first of them."""
        own = dict(self._own(tensor))
        if not tensor.partial_axes:
            yield from own.items()
            return
        mesh = self.plan.mesh
        shares = tuple((axis, placement) for axis, placement in tensor.spec if axis in tensor.partial_axes)
        wide = {rank: x.astype(np.float32) if is_narrow(x.dtype) else x for rank, x in own.items()}
        for rank in own:
            if rank == mesh.group(rank, tensor.partial_axes)[0]:
                yield rank, join_views(wide, shares, mesh, rank)

    def _whole(self, tensor: Tensor) -> np.ndarray:
        """The tensor, put together; the memory of a rank itself where that holds all of it."""
        own = dict(self._own(tensor))
        return own[0] if tensor.is_whole else join_views(own, tensor.spec, self.plan.mesh)

    def _value(self, name: str, anchor: Tensor | None) -> np.ndarray:
        """An anchor's value in the model's dtype."""
        if anchor is None:
            return np.asarray(self.feeds[name])
        value = self.kept[anchor.number] if anchor.number in self.kept else self._whole(anchor)
        return value.astype(np.float32) if self.widened and is_narrow(value.dtype) else value

    def _cut(self, array: np.ndarray, tensor: Tensor, rank: int) -> np.ndarray:
        """The piece of a whole tensor that a rank should have, or of a sum all its ranks together."""
        spec = tuple((axis, placement) for axis, placement in tensor.spec if axis not in tensor.partial_axes)
        return cut_view(array, spec, self.plan.mesh, rank, np)
