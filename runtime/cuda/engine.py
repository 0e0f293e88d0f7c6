"""The engine on a GPU: the whole program, collectives included, captured in one CUDA graph.

The first run launches every instruction by itself, which also loads kernels and connects the ranks. The second run
captures, and from then on a run is one launch. A program that cannot be captured goes on as in the first run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import onnxmesh.runtime.cuda.kernels  # noqa: F401  (registers them)
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.cuda import gemm
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.dtypes import dtype, is_float8
from onnxmesh.runtime.engine import Engine, Hook
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.plan import Launch, Program

if TYPE_CHECKING:
    from onnxmesh.runtime.cuda.device import CudaDevice

_NEED_GEMM = frozenset(("MatMul", "FusedMatMul", "Attention", "AttentionBlock", "Conv", "ConvTranspose", "Einsum"))
_NEVER = frozenset(("Compress", "Resize"))
"""What waits for the device."""


class CudaEngine(Engine):
    """Runs a program on one GPU. Its memory is `device`'s; `weights` are there already.

    Raises PlanError for a program with 8-bit floats, of which CuPy has no arrays.

    Attributes:
        not_captured: why the program is not in a CUDA graph; empty if it is, or may yet be.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[Array],
        communicator: Communicator,
        device: CudaDevice,
        hook: Hook | None = None,
    ) -> None:
        _check_dtypes(program)
        self._device = device
        self._graph: Any = None
        self._runs = 0
        self._scratch = import_cupy().cuda.MemoryPool()  # what a graph uses between its kernels
        super().__init__(program, weights, communicator, device.xp, hook)
        self.not_captured = _obstacle(program) if device.graph and hook is None else "not asked for"

    @property
    def captured(self) -> bool:
        """Whether a run is the launch of one CUDA graph."""
        return self._graph is not None

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Enqueue the program on the device's stream; see Engine.run."""
        with self._device.scope():
            for buffer, given in zip(self._inputs, inputs, strict=True):
                _fill(buffer, given)
            if self._runs == 1 and not self.not_captured:
                self._capture()
            if self._graph is not None:
                self._graph.launch(self._device.stream)
            else:
                self._launch()
            self._runs += 1
            return [self._arrays[port.buffer] for port in self.program.outputs]

    def close(self) -> None:
        """Let the graph go: NCCL waits for graphs before it ends (pytorch/pytorch#115388)."""
        self._graph = None

    def _launch(self) -> None:
        with import_cupy().cuda.using_allocator(self._scratch.malloc):
            for index, (item, step) in enumerate(zip(self.program.instructions, self._steps)):
                self._do(index, item, step)

    def _capture(self) -> None:
        stream, cupy = self._device.stream, import_cupy()
        self._device.synchronize()
        stream.begin_capture()
        try:
            self._launch()
        except Exception as error:
            self.not_captured = " ".join(str(error).split())
        try:
            graph = stream.end_capture()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            self.not_captured = self.not_captured or str(error)
        if not self._all(not self.not_captured):
            self.not_captured = self.not_captured or "another rank could not capture it"
        else:
            self._graph = graph
            graph.upload(stream)

    def _all(self, here: bool) -> bool:
        """Whether it is so on every rank."""
        everyone = tuple(range(self.communicator.mesh.size))
        flag = self._xp.full(1, here, self._xp.uint8)
        return bool(self._device.get(self.communicator.all_reduce(flag, everyone, "min"))[0])


def _check_dtypes(program: Program) -> None:
    for buffer in program.buffers:
        if is_float8(dtype(buffer.dtype)):
            raise PlanError(f"{buffer.dtype} does not run on GPUs yet", hint='use device="cpu"')


def _obstacle(program: Program) -> str:
    """The first instruction that cannot be captured; empty if there is none."""
    for item in program.instructions:
        if isinstance(item, Launch):
            if item.kernel in _NEED_GEMM and not gemm.available():
                return f"{item.kernel} of node {item.node!r}: cuBLASLt is missing (pip install nvmath-python)"
            if item.kernel in _NEVER:
                return f"{item.kernel} of node {item.node!r} waits for the device"
    return ""


def _fill(buffer: Array, given: Array) -> None:
    """Copy an input to its buffer, from the host or from a device."""
    if isinstance(given, np.ndarray):
        buffer.set(np.ascontiguousarray(given).reshape(buffer.shape))
    else:
        buffer[...] = given
