"""Where a rank computes: the host, or a GPU (onnxmesh.runtime.cuda.device)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.engine import Engine, Hook
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.plan import Program


class Device(Protocol):
    """What a session needs of the place where a rank computes."""

    xp: Any

    def scope(self) -> AbstractContextManager[None]:
        """Everything that makes or changes arrays happens within it."""
        ...

    def engine(
        self, program: Program, weights: Sequence[np.ndarray], communicator: Communicator, hook: Hook | None
    ) -> Engine:
        """One rank's engine."""
        ...

    def put(self, array: np.ndarray) -> Array:
        """The array on the device."""
        ...

    def get(self, array: Array) -> np.ndarray:
        """A copy on the host; what was computed before is complete."""
        ...


class HostDevice(Device):
    """The CPU, through NumPy."""

    xp = np

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def engine(
        self, program: Program, weights: Sequence[np.ndarray], communicator: Communicator, hook: Hook | None
    ) -> Engine:
        return Engine(program, weights, communicator, hook=hook)

    def put(self, array: np.ndarray) -> Array:
        return array

    def get(self, array: Array) -> np.ndarray:
        return np.array(array)
