"""Two runs beside each other: two plans of a model, or one plan on GPUs and on the host.

Rounding adds up here from tensor to tensor, so tensors are compared as outputs are, by the norm of their difference
(docs/verify.md). Both run at once; a tensor is kept until the other run has it too, and a run that is ahead waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxmesh.compiler.errors import VerificationError
from onnxmesh.compiler.verification import Comparison, Verification, compare_values, default_tolerance
from onnxmesh.runtime.engine import Hook
from onnxmesh.runtime.plan import Instruction, Plan
from onnxmesh.runtime.session import Session
from onnxmesh.verification.correspondence import Tensor, tensors
from onnxmesh.verification.memory import DAY, whole
from onnxmesh.verification.model import Arrays, Model

AHEAD = 256 << 20
"""Bytes of tensors that wait for the other run before the one that is ahead does."""


@dataclass(frozen=True)
class Run:
    """A plan, where its weights are, and what runs it."""

    plan: Plan
    weights: Any = None
    device: str = "cpu"
    name: str = "the other run"


def compare_runs(
    ours: Run, other: Run, feeds: Arrays, *, model: Model | None = None, tolerance: float | None = None
) -> Verification:
    """Compare the outputs of two runs; with a model every tensor of it that both hold, in the order of `ours`.

    Raises:
        VerificationError: a run does not know what it holds, or they have other outputs.
        RunError: a run failed.
    """
    limit = max(map(default_tolerance, (ours.plan, other.plan))) if tolerance is None else tolerance
    shelf = _Shelf(lambda name, a, b: list(compare_values(name, a, b, limit)))
    names = _common(ours, other, model)
    with ThreadPoolExecutor(2) as pool:
        work = [
            pool.submit(_run, side, run, feeds, shelf, {n: t[side] for n, t in names.items()})
            for side, run in enumerate((ours, other))
        ]
        outputs = [future.result() for future in work]
    if set(outputs[0]) != set(outputs[1]):
        raise VerificationError(
            f"one has the outputs {', '.join(outputs[0])}, the other {', '.join(outputs[1])}", code="OM6105"
        )
    rows = [row for name in names for row in shelf.rows.get(name, ())]
    for name, value in outputs[0].items():
        rows += compare_values(name, value, outputs[1][name], limit)
    return Verification(other.name, tuple(rows))


def _common(ours: Run, other: Run, model: Model | None) -> dict[str, tuple[Tensor, Tensor]]:
    """The values that both hold, by name, each in the first of its forms that is no sum yet to be made."""
    if model is None:
        return {}
    forms: list[dict[str, Tensor]] = []
    for run in (ours, other):
        found: dict[str, Tensor] = {}
        for tensor in sorted(tensors(run.plan, model), key=lambda t: (bool(t.partial_axes), t.number)):
            found.setdefault(tensor.name, tensor)
        forms.append(found)
    names = sorted(forms[0].keys() & forms[1].keys(), key=lambda name: forms[0][name].number)
    return {name: (forms[0][name], forms[1][name]) for name in names if name not in model.inputs}


def _run(side: int, run: Run, feeds: Arrays, shelf: _Shelf, wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """Run one of the two, and bring what is wanted to the shelf; its outputs by name."""
    due: dict[int, list[Tensor]] = {}
    for tensor in wanted.values():
        due.setdefault(tensor.ready, []).append(tensor)

    def hook(rank: int) -> Hook:
        def after(index: int, item: Instruction, outs: Sequence[Any]) -> None:
            if index in due:
                comm = session.engines[rank].communicator
                comm.barrier()
                if rank == 0:
                    for tensor in due[index]:
                        shelf.bring(side, tensor.name, np.array(whole(session, tensor)))
                comm.barrier()

        return after

    try:
        hooks: Callable[[int], Hook] | None = hook if due else None
        with Session(run.plan, run.device, weights=run.weights, timeout=DAY, hooks=hooks) as session:
            if due and not session.engines:
                raise VerificationError(
                    "ranks on several GPUs show their outputs alone", hint="leave out --each", code="OM6103"
                )
            outputs = session.run(None, session.check(feeds))
            return dict(zip((port.name for port in session.get_outputs()), outputs))
    finally:
        shelf.leave(side)


@dataclass
class _Shelf:
    """Where two runs leave tensors for each other; who brings the second of a name compares them."""

    compare: Callable[[str, np.ndarray, np.ndarray], list[Comparison]]
    rows: dict[str, list[Comparison]] = field(default_factory=dict)
    _held: dict[str, np.ndarray] = field(default_factory=dict)
    _idle: set[int] = field(default_factory=set)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def bring(self, side: int, name: str, array: np.ndarray) -> None:
        """Leave a tensor, or compare it with the other run's."""
        with self._changed:
            other = self._held.pop(name, None)
            self._changed.notify_all()
            if other is None:
                self._held[name] = array
                self._idle.add(side)  # until the other run has caught up, unless it waits as well
                self._changed.wait_for(lambda: self._bytes() <= AHEAD or 1 - side in self._idle)
                self._idle.discard(side)
                return
        rows = self.compare(name, *((array, other) if side == 0 else (other, array)))
        with self._changed:
            self.rows[name] = rows

    def leave(self, side: int) -> None:
        """A run has ended."""
        with self._changed:
            self._idle.add(side)
            self._changed.notify_all()

    def _bytes(self) -> int:
        return sum(array.nbytes for array in self._held.values())
