"""Which rank's instruction is wrong: every instruction between two tensors runs again, by the host's kernels.

A wrong tensor says which of its elements are wrong. Where ranks hold shares of a sum, or several instructions lie
between the tensor and those it was computed from, that is not yet a rank and an instruction. So the run is repeated,
and each of those instructions is computed again, on the inputs that its rank has, by NumPy. On the host this finds what
the engine's own memory, threads or a patched kernel did; on a GPU, whatever its kernels did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxmesh.runtime.bound_values import bound_values
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.engine import Hook
from onnxmesh.runtime.kernels.registry import Call, TensorType, find_for
from onnxmesh.runtime.plan import Collective, Control, Instruction, Launch, Plan, Program
from onnxmesh.runtime.session import Session
from onnxmesh.verification.correspondence import Tensor
from onnxmesh.verification.model import Arrays
from onnxmesh.verification.rounding import Bound, judge, scale, unit_roundoff


@dataclass(frozen=True)
class Suspect:
    """An instruction that gave on a rank what the host's kernel does not give for its inputs."""

    instruction: int
    kernel: str
    node: str
    rank: int
    wrong: int


def suspects(
    plan: Plan,
    feeds: Arrays,
    tensor: Tensor,
    anchors: Iterable[Tensor | None],
    weights: Any = None,
    device: str = "cpu",
) -> list[Suspect]:
    """The wrong instructions between the anchors of a tensor and itself, in their order; the run is repeated for it."""
    program = plan.programs[0]
    between = _between(program, tensor, [anchor for anchor in anchors if anchor is not None])
    found: list[Suspect] = []

    def hook(rank: int) -> Hook:
        def after(index: int, item: Instruction, outs: Sequence[Any]) -> None:
            if index in between and isinstance(item, Launch) and not isinstance(item, Control):
                wrong = _wrong(session, program, item, rank, outs)
                if wrong:
                    found.append(Suspect(index, item.kernel, item.node, rank, wrong))

        return after

    values = {name: x for name, x in feeds.items() if name not in bound_values(program)}
    with Session(plan, device, weights=weights, hooks=hook) as session:
        session.run(None, session.check(values))
    return sorted(found, key=lambda item: (item.instruction, item.rank))


def _between(program: Program, tensor: Tensor, anchors: Sequence[Tensor]) -> set[int]:
    """The instructions that a tensor waits for, back to those that made its anchors."""
    made = {anchor.ready for anchor in anchors if anchor.ready != tensor.ready}
    waiting, seen = [tensor.ready], set[int]()
    while waiting:
        index = waiting.pop()
        if index not in seen and index not in made:
            seen.add(index)
            waiting += program.instructions[index].after
    return seen


def _wrong(session: Session, program: Program, item: Launch, rank: int, outs: Sequence[Any]) -> int:
    """How many elements of an instruction's results are not what the host's kernel gives."""
    engine, get = session.engines[rank], session.device.get
    touched = [program.buffers[number] for number in (*item.ins, *item.outs) if number >= 0]
    if isinstance(item, Collective) or any(buffer.is_loose for buffer in touched):
        return 0
    ins = [None if number < 0 else np.ascontiguousarray(get(engine.array(number))) for number in item.ins]
    types = tuple(TensorType(dtype(program.buffers[i].dtype), program.buffers[i].shape) for i in item.outs)
    call = Call(np, item.attrs, types, session.plan.mesh.coordinate(rank))
    with np.errstate(all="ignore"):
        results = find_for(item, program.buffers, "numpy")(call, *ins)
    results = results if isinstance(results, tuple) else (results,)
    wrong = 0
    for ours, again in zip(outs, results):
        ours, again = np.asarray(get(ours)), np.asarray(again)
        terms = max((1, *(size for x in ins if x is not None for size in x.shape)))
        bound = Bound(terms, 1, max(unit_roundoff(x.dtype) for x in (ours, again)), 1)
        wrong += judge(ours, again, scale(again), bound).wrong
    return wrong
