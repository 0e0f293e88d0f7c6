"""Run a plan and compare every tensor as it goes: the ranks wait after an instruction while its results are checked.

Nothing is collected: what is compared is read in the ranks' own memory, where it still is; only what is overwritten
before its last use is kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxmesh.compiler.errors import VerificationError
from onnxmesh.runtime.bound_values import bound_values
from onnxmesh.runtime.dtypes import dtype, is_narrow
from onnxmesh.runtime.engine import Hook
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.placement import Replicate, text
from onnxmesh.runtime.plan import Instruction, Launch, Plan
from onnxmesh.runtime.recipe import Fetch
from onnxmesh.runtime.session import Session
from onnxmesh.verification.comparison import Comparison, compare
from onnxmesh.verification.correspondence import Check, Schedule, Tensor, schedule
from onnxmesh.verification.memory import DAY, held, pieces, whole
from onnxmesh.verification.model import Arrays, Model, NotComparable, Path, Segment
from onnxmesh.verification.oracle import Oracle
from onnxmesh.verification.replay import Suspect
from onnxmesh.verification.rounding import Spread, unit_roundoff


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
        check: the model's nodes that make it from the tensors before, and where these are.
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
        suspects: the instructions behind the first difference that the host computes otherwise.
    """

    compared: list[Compared] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    references: Mapping[str, int] = field(default_factory=dict)
    exact: int = 0
    seconds: float = 0.0
    suspects: Sequence[Suspect] = ()

    @property
    def reasons(self) -> Counter[str]:
        """How many values were not compared, by reason."""
        return Counter(self.skipped.values())

    def check(self) -> None:
        """Raise VerificationError if a tensor is wrong; it names the first, its node and rank."""
        if self.differences:
            first = self.differences[0]
            ranks = " and ".join(map(str, first.ranks))
            behind = "".join(
                f" (instruction {x.instruction}, {x.kernel} of {x.node!r}, on rank {x.rank})" for x in self.suspects[:1]
            )
            raise VerificationError(
                f"{len(self.differences)} of {len(self.compared)} tensors are wrong; the first is "
                f"{first.compared.name!r} of node {first.compared.node!r} on rank {ranks}{behind}, element "
                f"{list(first.index)}: {first.ours!s}, the reference has {first.reference!s}",
                code="OM6101",
            )


def examine(
    plan: Plan,
    model: Model | Path,
    feeds: Arrays,
    *,
    weights: Fetch | Path | None = None,
    device: str = "cpu",
    keep: Callable[[Difference], Arrays] | None = None,
) -> Examination:
    """Run `plan` and compare every tensor of it with what the nodes of `model` make of the tensors before.

    Args:
        feeds: the plan's inputs, by name.
        weights: where the plan's weights are, if not where it came from.
        device: `cpu`; or `cuda` for a plan of one rank.
        keep: given the first difference, with its arrays; says which of them stay, as when it has written them to disk.

    Raises:
        VerificationError: the plan does not know what it holds, or is of another model.
        RunError: the run failed.
    """
    model = model if isinstance(model, Model) else Model(model)
    begin = time.perf_counter()
    work = _Work(plan, model, schedule(plan, model), {**bound_values(plan.programs[0]), **feeds}, keep)
    source = weights if weights is None or callable(weights) else str(weights)
    with Session(plan, device, weights=source, timeout=DAY, hooks=work.hook) as session:
        if not session.engines:
            raise RunError(
                "ranks on several GPUs cannot be compared tensor by tensor", hint="leave out --each", code="OM6103"
            )
        work.session = session
        session.run(None, session.check(feeds))
    result = work.result
    result.skipped = work.schedule.skipped | result.skipped
    result.references, result.exact = work.oracle.used, work.oracle.exact
    result.seconds = time.perf_counter() - begin
    return result


class _Work:
    """A run that is being compared."""

    def __init__(
        self, plan: Plan, model: Model, schedule: Schedule, feeds: Arrays, keep: Callable[[Difference], Arrays] | None
    ) -> None:
        self.plan, self.model, self.schedule, self.feeds, self.keep = plan, model, schedule, feeds, keep
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
            except NotComparable as error:
                self.result.skipped[tensor.name] = str(error.args[0])
        if tensor.number in self.schedule.keep:
            self.kept[tensor.number] = np.array(whole(self._open, tensor))
        for number in [n for n in self.kept if self.schedule.keep[n] <= tensor.number]:
            del self.kept[number]

    def _compare(self, check: Check, item: Instruction) -> None:
        tensor, segment = check.tensor, check.segment
        values = {name: self._value(name, anchor) for name, anchor in check.anchors.items()}
        expected = self.oracle.run(segment, values)[tensor.name] if segment.nodes else values[tensor.name]
        if tuple(expected.shape) != tensor.shape:
            raise NotComparable("of another shape in the plan")
        own = dict(pieces(self._open, tensor))
        unit = max(map(unit_roundoff, (expected.dtype, *self._dtypes(check))))
        bound = self.oracle.bound(segment, values, unit, tensor.name)

        def spread() -> Spread | None:
            return self._spread(segment, values, expected, bound.relative) if segment.nodes else None

        found = compare(tensor, self.plan.mesh, own, expected, bound, spread)
        compared = self._compared(found, item)
        self.result.compared.append(compared)
        if compared.wrong:
            first = not self.result.differences
            difference = self._difference(found, compared, check, self._arrays(found, values) if first else {})
            if first and self.keep is not None:
                difference = replace(difference, arrays=self.keep(difference))
            self.result.differences.append(difference)

    def _dtypes(self, check: Check) -> Iterator[np.dtype]:
        """In what the run keeps a tensor and its anchors."""
        buffers = self.plan.programs[0].buffers
        for tensor in (check.tensor, *check.anchors.values()):
            if tensor is not None:
                yield dtype(buffers[tensor.buffer].dtype)

    def _spread(self, segment: Segment, values: Arrays, expected: np.ndarray, change: float) -> Spread | None:
        """What float64 says; None where nothing computes the segment in it."""
        (name,) = segment.outputs
        try:
            runs = self.oracle.run_exactly(segment, values, change)
            return Spread.of(next(runs)[name], expected, (run[name] for run in runs))
        except NotComparable:
            return None

    def _compared(self, found: Comparison, item: Instruction) -> Compared:
        tensor, piece, mesh = found.tensor, next(iter(found.pieces.values())), self.plan.mesh
        number = self.model.producer(tensor.name)
        return Compared(
            tensor.name,
            "" if number is None else self.model.label(number),
            "an input" if number is None else self.model.op(number),
            item.kernel if isinstance(item, Launch) else item.kind,
            tensor.ready,
            piece.dtype.name,
            tensor.shape,
            {axis: text(p, mesh.axis_size(axis)) for axis, p in tensor.spec if not isinstance(p, Replicate)},
            found.worst,
            found.largest,
            found.wrong,
            found.spread is not None,
        )

    def _difference(self, found: Comparison, compared: Compared, check: Check, arrays: Arrays) -> Difference:
        place, shares = found.first(), found.tensor.partial_axes
        ranks = self.plan.mesh.group(place.rank, shares) if shares else (place.rank,)
        ours, right = found.pieces[place.rank][place.local], found.expected[place.index]
        exact, limit = found.exact(place.index), found.allowed(place.index)
        return Difference(compared, ranks, place.index, place.local, ours, right, exact, limit, check, arrays)

    def _arrays(self, found: Comparison, values: Arrays) -> dict[str, np.ndarray]:
        """What a bug report needs of a tensor, in memory of its own."""
        arrays = {f"rank{rank}": np.array(x) for rank, x in held(self._open, found.tensor)}
        arrays["reference"] = np.array(found.expected)
        if found.spread is not None:
            arrays["float64"] = found.spread.exact
        return arrays | {f"input.{name}": np.array(x) for name, x in values.items()}

    @property
    def _open(self) -> Session:
        assert self.session is not None
        return self.session

    def _value(self, name: str, anchor: Tensor | None) -> np.ndarray:
        """An anchor's value in the model's dtype."""
        if anchor is None:
            return np.asarray(self.feeds[name])
        value = self.kept[anchor.number] if anchor.number in self.kept else whole(self._open, anchor)
        return value.astype(np.float32) if self.widened and is_narrow(value.dtype) else value
