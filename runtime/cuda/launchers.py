"""Launchers: an instruction is prepared once, and then launched without allocating.

A launcher looks at an instruction together with its memory and returns what enqueues it, or None where the case is
not its own; the generic kernel then runs in its place, which is right and slow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.kernels.registry import Array

Launch = Callable[[int], None]
"""Enqueue on the stream of this pointer (cudaStream_t). It neither allocates nor waits, so a graph can capture it."""


class Workspace:
    """Scratch memory that the launches of one stream share, one after another."""

    def __init__(self) -> None:
        self._reserved = 0
        self._memory: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes that are there, or will be once there is a launch."""
        return self._reserved

    @property
    def ptr(self) -> int:
        """Where the memory is, aligned to 256 bytes; it may move while more is reserved."""
        if self._memory is None or self._memory.size < self._reserved:
            self._memory = import_cupy().empty(max(self._reserved, 256), "u1")
        return int(self._memory.data.ptr)

    def reserve(self, nbytes: int) -> None:
        """While preparing: at least so many bytes will be there."""
        self._reserved = max(self._reserved, -(-nbytes // 256) * 256)


@dataclass(frozen=True, slots=True)
class Job:
    """One instruction of a program with its memory: what a launcher prepares.

    Attributes:
        kernel: its op.
        ins: arrays in memory that stays, of any strides; None for an absent optional input.
        outs: arrays in memory that stays, to be written; of any strides.
        constant: for every input whether it is a weight: its values are there already and never change.
        node: the ONNX node that it comes from.
        multiprocessors: how many it should fill, where something runs beside it; 0: all.
    """

    kernel: str
    attrs: Mapping[str, Any]
    ins: tuple[Array | None, ...]
    outs: tuple[Array, ...]
    constant: tuple[bool, ...]
    coordinate: Mapping[str, int]
    workspace: Workspace
    node: str = ""
    multiprocessors: int = 0


Launcher = Callable[[Job], Launch | None]
_LAUNCHERS: dict[str, list[Launcher]] = defaultdict(list)


def launcher(*ops: str) -> Callable[[Launcher], Launcher]:
    """Register the decorated function for `ops`. Several for one op are tried in the order of registration."""

    def register(function: Launcher) -> Launcher:
        for op in ops:
            _LAUNCHERS[op].append(function)
        return function

    return register


def prepare(job: Job) -> Launch | None:
    """What launches the job, from the first launcher that takes it; None if there is none."""
    for function in _LAUNCHERS.get(job.kernel, ()):
        launch = function(job)
        if launch is not None:
            return launch
    return None


def chain(launches: Sequence[Launch]) -> Launch:
    """The launches one after the other, as one."""
    if len(launches) == 1:
        return launches[0]

    def launch(stream: int) -> None:
        for each in launches:
            each(stream)

    return launch
