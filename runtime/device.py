"""Where a rank computes: the host, or a GPU (onnxmesh.runtime.cuda.device)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnxmesh.runtime import agreement, random_weights
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.engine import Engine, Hook
from onnxmesh.runtime.errors import InvalidArgument
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.plan import Plan, Program
from onnxmesh.runtime.recipe import Fetch
from onnxmesh.runtime.serialize import read_weights
from onnxmesh.runtime.validate import shard_key, weight_entry


class Device(Protocol):
    """What a session needs of the place where a rank computes."""

    xp: Any

    def scope(self) -> AbstractContextManager[None]:
        """Everything that makes or changes arrays happens within it."""
        ...

    def running(self, stream: Any = None, *, first: bool = False) -> AbstractContextManager[None]:
        """The scope of one run, which has a deadline; a later one while a program is `first` run.

        With a `stream` of the caller's the run follows what is on it, and what the caller puts there afterwards
        follows the run; without one the run is complete at the end.
        """
        ...

    def agree(self, communicator: Communicator, facts: agreement.Facts) -> None:
        """Return if every rank has the same facts, and the same libraries; see onnxmesh.runtime.agreement."""
        ...

    def load(
        self, source: Fetch | str | Path, plan: Plan, coordinates: Sequence[Mapping[str, int]]
    ) -> list[list[Array]]:
        """The weights of the ranks at `coordinates`, each in the order of the plan's, on the device."""
        ...

    def loaded(self, error: Exception | None) -> None:
        """Called by every rank after loading, with what went wrong; raises it, or what went wrong on another rank."""
        ...

    def engine(
        self, program: Program, weights: Sequence[Array], communicator: Communicator, hook: Hook | None
    ) -> Engine:
        """One rank's engine. Weights of the host are put on the device."""
        ...

    def adopt(self, value: Any) -> Array:
        """Any array as one of NumPy or of the device, without a copy where it is one in all but name.

        Raises InvalidArgument for what is no array, or is on another device.
        """
        ...

    def holds(self, array: Array) -> bool:
        """Whether an adopted array is in this device's memory."""
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

    def running(self, stream: Any = None, *, first: bool = False) -> AbstractContextManager[None]:
        if stream is not None:
            raise InvalidArgument("a session on the CPU has no streams", hint="leave stream= out", code="OM5009")
        return nullcontext()

    def agree(self, communicator: Communicator, facts: agreement.Facts) -> None:
        agreement.agree(communicator, facts)

    def load(
        self, source: Fetch | str | Path, plan: Plan, coordinates: Sequence[Mapping[str, int]]
    ) -> list[list[Array]]:
        if source == random_weights.RANDOM:
            return _random(plan, coordinates)
        return read_weights(source, plan, coordinates)

    def loaded(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    def engine(
        self, program: Program, weights: Sequence[Array], communicator: Communicator, hook: Hook | None
    ) -> Engine:
        return Engine(program, weights, communicator, hook=hook)

    def adopt(self, value: Any) -> Array:
        try:
            return np.asarray(value)
        except Exception as error:  # a tensor of another library, with errors of its own
            raise InvalidArgument(f"not an array of the CPU: {' '.join(str(error).split())}", code="OM5009") from error

    def holds(self, array: Array) -> bool:
        return isinstance(array, np.ndarray)

    def put(self, array: np.ndarray) -> Array:
        return array

    def get(self, array: Array) -> np.ndarray:
        return np.array(array)


def _random(plan: Plan, coordinates: Sequence[Mapping[str, int]]) -> list[list[Array]]:
    shards: dict[tuple[str, str], Array] = {}
    for weight in plan.weights:
        name, shape = weight_entry(weight, plan.mesh)
        for key in {shard_key(weight.spec, plan.mesh, at) for at in coordinates}:
            shards[weight.name, key] = random_weights.random_shard(weight.name, key, dtype(name), shape)
    return [[shards[w.name, shard_key(w.spec, plan.mesh, at)] for w in plan.weights] for at in coordinates]
