"""One GPU, as sessions see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxmesh.runtime import agreement
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.device import Device
from onnxmesh.runtime.engine import Engine, Hook
from onnxmesh.runtime.errors import InvalidArgument, RunError
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.plan import Plan, Program
from onnxmesh.runtime.recipe import Fetch

if TYPE_CHECKING:
    from onnxmesh.runtime.nccl import NcclGroups

_FIRST = 120.0
"""Seconds that a first run may take besides the timeout: kernels are compiled, ranks connected, graphs captured."""
_LOADING = 300.0
"""Seconds that ranks may take to load after each other."""
_INSTALL = "pip install 'onnxmesh[cuda13]', or [cuda12] where the driver is older"


def import_cupy() -> Any:
    """CuPy.

    Raises:
        RunError: it is not installed, or cannot be loaded.
    """
    try:
        import cupy
    except ImportError as error:
        raise RunError(
            f"CUDA needs CuPy ({' '.join(str(error).split())[:200]})", hint=_INSTALL, code="OM5201"
        ) from error
    return cupy


def import_nccl() -> Any:
    """NCCL, through CuPy.

    Raises:
        RunError: it is not installed, or cannot be loaded.
    """
    import_cupy()
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise RunError(
            f"ranks on GPUs need NCCL ({' '.join(str(error).split())[:200]})", hint=_INSTALL, code="OM5201"
        ) from error
    return nccl


def device_count() -> int:
    """How many GPUs this process sees.

    Raises:
        RunError: there is no CuPy, no driver, or no GPU.
    """
    cupy = import_cupy()
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RunError(f"no GPU can be used: {error}", hint='use device="cpu"', code="OM5202") from error
    return count


def own_gpu(local_rank: int, count: int, visible: str | None) -> int:
    """The GPU of a rank among the `count` that its process sees: as on its host, so among the GPUs.

    `visible` is CUDA_VISIBLE_DEVICES: a launcher may show every process a single GPU of its own.

    Raises:
        RunError: there are more ranks on the host than GPUs.
    """
    if local_rank < count:
        return local_rank
    if count == 1 and visible:
        return 0
    raise RunError(
        f"rank {local_rank} of this host has no GPU: its process sees {count}",
        hint="start as many ranks on a host as it has GPUs",
        code="OM5202",
    )


class CudaDevice(Device):
    """A GPU with a stream and a memory pool of a session's own.

    Args:
        index: which of the GPUs that this process sees.
        groups: the communication that `get` watches over while it waits.
        graph: whether engines capture their program in a CUDA graph.

    Raises:
        RunError: there is no such GPU.
    """

    def __init__(self, index: int = 0, groups: NcclGroups | None = None, *, graph: bool = True) -> None:
        if not 0 <= index < device_count():
            raise RunError(f"there is no GPU {index}: this process sees {device_count()}", code="OM5202")
        from onnxmesh.runtime.cuda.namespace import Namespace

        self.xp = Namespace()
        self.graph = graph
        self._cupy = import_cupy()
        self._groups = groups
        self._device = self._cupy.cuda.Device(index)
        with self._device:
            self.stream = self._cupy.cuda.Stream(non_blocking=True)
            self.pool = self._cupy.cuda.MemoryPool()
            self._edge = self._cupy.cuda.Event(disable_timing=True)

    @contextmanager
    def scope(self) -> Iterator[None]:
        with self._device, self.stream, self._cupy.cuda.using_allocator(self.pool.malloc):
            yield

    @contextmanager
    def running(self, stream: Any = None, *, first: bool = False) -> Iterator[None]:
        from onnxmesh.runtime.cuda.foreign import stream_pointer

        given = self._cupy.cuda.get_current_stream() if stream is None else stream
        with self._guard(first), self.scope():
            runtime, caller = self._cupy.cuda.runtime, stream_pointer(given)
            runtime.eventRecord(self._edge.ptr, caller)
            self.stream.wait_event(self._edge)
            yield
            if stream is None:
                self.stream.synchronize()
                return
            done = self._cupy.cuda.Event(disable_timing=True)
            done.record(self.stream)
            runtime.streamWaitEvent(caller, done.ptr)
            if self._groups is not None:
                self._groups.expect(lambda: self._is_done(done))

    def agree(self, communicator: Communicator, facts: agreement.Facts) -> None:
        if communicator.mesh.size == 1:
            return
        assert self._groups is not None
        runtime, world = self._cupy.cuda.runtime, self._groups.world
        versions = {"CuPy": self._cupy.__version__, "CUDA": runtime.runtimeGetVersion(), "graph": self.graph}
        facts = {**facts, **{k: str(v) for k, v in versions.items()}, "NCCL": str(import_nccl().get_version())}
        if world.store is not None:
            agreement.require(world.allgather(facts))  # NCCL of another version might not even connect
        else:
            with self.scope():
                agreement.agree(communicator, facts, self.put, self.get)

    def load(
        self, source: Fetch | str | Path, plan: Plan, coordinates: Sequence[Mapping[str, int]]
    ) -> list[list[Array]]:
        from onnxmesh.runtime.cuda import upload

        with self._attend(), self.scope():
            return [upload.load(source, plan, at) for at in coordinates]

    def loaded(self, error: Exception | None) -> None:
        if self._groups is not None:
            self._groups.world.together(error, _LOADING)
        elif error is not None:
            raise error

    def engine(
        self, program: Program, weights: Sequence[Array], communicator: Communicator, hook: Hook | None
    ) -> Engine:
        from onnxmesh.runtime.cuda.engine import CudaEngine

        with self._attend(), self.scope():
            return CudaEngine(program, [self.put(x) for x in weights], communicator, self, hook)

    def adopt(self, value: Any) -> Array:
        from onnxmesh.runtime.cuda.foreign import as_array

        with self.scope():
            array = as_array(value)
        if isinstance(array, self._cupy.ndarray) and int(array.device.id) != int(self._device.id):
            raise InvalidArgument(
                f"the array is on GPU {array.device.id}, this session on GPU {self._device.id}", code="OM5009"
            )
        return array

    def holds(self, array: Array) -> bool:
        return isinstance(array, self._cupy.ndarray)

    def put(self, array: np.ndarray) -> Array:
        from onnxmesh.runtime.cuda.hosted import as_stored

        with self.scope():
            return self._cupy.asarray(as_stored(array))

    def get(self, array: Array) -> np.ndarray:
        with self.scope():
            self.synchronize()
            return np.array(self._cupy.asnumpy(array))

    def synchronize(self) -> None:
        """Wait for the stream, as long as the communicators' timeout lets it.

        Raises:
            RunError: another rank has failed, or did not arrive in time.
        """
        with self._guard():
            self.stream.synchronize()

    def _guard(self, first: bool = False) -> AbstractContextManager[None]:
        if self._groups is None:
            return nullcontext()
        return self._groups.guard(self._groups.world.timeout + _FIRST if first else 0.0)

    def _attend(self) -> AbstractContextManager[None]:
        return nullcontext() if self._groups is None else self._groups.attend()

    def _is_done(self, event: Any) -> bool:
        with self._cupy.cuda.Device(self._device.id):  # the watchdog's thread has a current device of its own
            return bool(event.done)
