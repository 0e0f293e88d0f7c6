"""One GPU, as sessions see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.device import Device
from onnxmesh.runtime.engine import Engine, Hook
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.plan import Program

if TYPE_CHECKING:
    from onnxmesh.runtime.nccl import NcclGroups

_INSTALL = "pip install 'onnxmesh[cuda13]', or [cuda12] where the driver is older"


def import_cupy() -> Any:
    """CuPy.

    Raises:
        RunError: it is not installed, or cannot be loaded.
    """
    try:
        import cupy
    except ImportError as error:
        raise RunError(f"CUDA needs CuPy ({' '.join(str(error).split())[:200]})", hint=_INSTALL) from error
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
        raise RunError(f"ranks on GPUs need NCCL ({' '.join(str(error).split())[:200]})", hint=_INSTALL) from error
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
        raise RunError(f"no GPU can be used: {error}", hint='use device="cpu"') from error
    return count


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
            raise RunError(f"there is no GPU {index}: this process sees {device_count()}")
        from onnxmesh.runtime.cuda.namespace import Namespace

        self.xp = Namespace()
        self.graph = graph
        self._cupy = import_cupy()
        self._groups = groups
        self._device = self._cupy.cuda.Device(index)
        with self._device:
            self.stream = self._cupy.cuda.Stream(non_blocking=True)
            self.pool = self._cupy.cuda.MemoryPool()

    @contextmanager
    def scope(self) -> Iterator[None]:
        with self._device, self.stream, self._cupy.cuda.using_allocator(self.pool.malloc):
            yield

    def engine(
        self, program: Program, weights: Sequence[np.ndarray], communicator: Communicator, hook: Hook | None
    ) -> Engine:
        from onnxmesh.runtime.cuda.engine import CudaEngine

        with self.scope():
            return CudaEngine(program, [self.put(x) for x in weights], communicator, self, hook)

    def put(self, array: np.ndarray) -> Array:
        with self.scope():
            return self._cupy.asarray(array)

    def get(self, array: Array) -> np.ndarray:
        with self.scope():
            self.synchronize()
            return np.array(self._cupy.asnumpy(array))

    def synchronize(self) -> None:
        """Wait for the stream, as long as the communicators' timeout lets it.

        Raises:
            RunError: another rank has failed, or did not arrive in time.
        """
        if self._groups is None:
            self.stream.synchronize()
            return
        with self._groups.guard():
            self.stream.synchronize()
