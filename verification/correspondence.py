"""What a run is compared with, tensor by tensor: which buffer is which value of the model, and which of them tell it.

Every value is computed by the model's own nodes from the values before it which the run itself has made, its anchors.
So a wrong node is seen where it is, and nowhere behind it; and rounding does not add up over a model's depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from onnxmesh.compiler.errors import VerificationError
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial, Replicate, from_json
from onnxmesh.runtime.plan import Plan, Program, Spec
from onnxmesh.runtime.views import cut_view
from onnxmesh.verification.model import Model, Segment


@dataclass(frozen=True)
class Tensor:
    """A value of the model in the memory of every rank, good after the instruction `ready` until `until` runs."""

    number: int
    name: str
    buffer: int
    ready: int
    until: float
    shape: tuple[int, ...]
    spec: Spec

    @property
    def partial_axes(self) -> tuple[str, ...]:
        """The axes whose ranks hold shares of a reduction."""
        return tuple(axis for axis, placement in self.spec if isinstance(placement, Partial))

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of it."""
        return all(isinstance(placement, Replicate) for _, placement in self.spec)


@dataclass(frozen=True)
class Check:
    """A tensor, the nodes that make it from its anchors, and the tensors that hold these (None: the run's inputs)."""

    tensor: Tensor
    segment: Segment
    anchors: dict[str, Tensor | None]


@dataclass(frozen=True)
class Schedule:
    """All checks, in the order of the run.

    Attributes:
        checks: by the instruction after which they are made.
        keep: tensors that are overwritten before their last check: the number of the tensor -> the last one's.
        skipped: the model's values that are not compared, and why not.
    """

    checks: dict[int, list[Check]]
    keep: dict[int, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.checks.values()))


def tensors(plan: Plan, model: Model) -> list[Tensor]:
    """The model's values that a plan holds, in the order of the run; those of one instruction in the model's.

    Raises VerificationError if the plan does not say which they are.
    """
    trace = plan.report.get("trace")
    if not any(model.has(entry["name"]) for entry in trace or ()):
        raise VerificationError(
            "the plan does not say which values of the model it holds", hint="compile it again", code="OM6102"
        )
    program = plan.programs[0]
    writes = _writes(program)
    order = model.values
    known = [entry for entry in trace or () if model.has(entry["name"])]
    known.sort(key=lambda entry: (entry["ready"], order.get(entry["name"], -1)))
    result = []
    for number, entry in enumerate(known):
        spec = tuple((axis, from_json(placement)) for axis, placement in entry["placement"].items())
        until = _until(program, entry["buffer"], entry["ready"], writes)
        shape = tuple(entry["shape"])
        result.append(Tensor(number, entry["name"], entry["buffer"], entry["ready"], until, shape, spec))
    return result


def schedule(plan: Plan, model: Model) -> Schedule:
    """What is checked when, and what has to be kept for it."""
    found = tensors(plan, model)
    checks: dict[int, list[Check]] = {}
    keep: dict[int, int] = {}
    before: dict[str, list[Tensor]] = {}
    for tensor in found:
        forms = before.setdefault(tensor.name, [])
        again = bool(forms) or tensor.name in model.inputs
        segment = Segment((), (tensor.name,), (), (tensor.name,)) if again else model.segment([tensor.name], before)
        anchors = {name: _anchor(before.get(name, ()), tensor, keep) for name in segment.inputs}
        for anchor in anchors.values():
            if anchor is not None and (anchor.number in keep or anchor.until <= tensor.ready):
                keep[anchor.number] = tensor.number
        checks.setdefault(tensor.ready, []).append(Check(tensor, segment, anchors))
        forms.append(tensor)
    return Schedule(checks, keep, _skipped(model, before))


def _anchor(forms: Sequence[Tensor], tensor: Tensor, keep: dict[int, int]) -> Tensor | None:
    """Which form of a value to read at a check: one that still stands, best one that each rank has whole."""
    if not forms:
        return None
    kept = [form for form in forms if form.number in keep]
    standing = [form for form in forms if form.until > tensor.ready]
    whole = [form for form in standing if form.is_whole]
    summed = [form for form in standing if not form.partial_axes]
    return next(iter((*whole, *kept, *summed, *standing, *reversed(forms))))


def _skipped(model: Model, compared: dict[str, list[Tensor]]) -> dict[str, str]:
    left = [name for name in model.values if name and name not in compared]
    return {
        name: "a constant, folded" if model.is_constant(name) else "inside a fused or recognised op" for name in left
    }


# --- how long a buffer holds what was written there ---------------------------------------------------------


def _writes(program: Program) -> np.ndarray:
    """(instruction, first byte, last byte + 1) of everything that is written in the arena."""
    rows = [
        (index, *place)
        for index, item in enumerate(program.instructions)
        for out in item.outs
        if (place := _place(program, out)) is not None
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


def _until(program: Program, buffer: int, ready: int, writes: np.ndarray) -> float:
    """The first instruction after `ready` that writes where the buffer lies."""
    place = _place(program, buffer)
    if place is None:
        return inf
    start, stop = place
    later = writes[(writes[:, 0] > ready) & (writes[:, 1] < stop) & (writes[:, 2] > start), 0]
    return int(later.min()) if later.size else inf


def _place(program: Program, number: int) -> tuple[int, int] | None:
    """The bytes of the arena among which a buffer's are; None where it lies elsewhere."""
    buffer, offset = program.buffers[number], 0
    if buffer.is_loose:
        return None
    size = buffer.nbytes
    if buffer.kind == "view" and buffer.strides:
        last = sum((dim - 1) * stride for dim, stride in zip(buffer.shape, buffer.strides)) + 1
        size = last * dtype(buffer.dtype).itemsize
    while buffer.kind == "view":
        offset += buffer.offset
        buffer = program.buffers[buffer.source]
    return (buffer.offset + offset, buffer.offset + offset + size) if buffer.kind == "arena" else None


def global_index(local: Sequence[int], tensor: Tensor, mesh: Mesh, rank: int) -> tuple[int, ...]:
    """Where an element of a rank's piece is in the tensor."""
    result = []
    for dim, index in enumerate(local):
        places = np.arange(tensor.shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(tensor.shape))])
        along = tuple((axis, p) for axis, p in tensor.spec if getattr(p, "dim", None) == dim)
        result.append(int(cut_view(places, along, mesh, rank, np).reshape(-1)[index]))
    return tuple(result)
