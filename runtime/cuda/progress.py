"""How far a rank's GPU has come, for the message when it gets no further.

A mark is one thread that writes a number to memory of the host. It can be captured in a CUDA graph, where the host
launches nothing that it could count.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.plan import Collective, Program

_SOURCE = """
extern "C" __global__ void onnxmesh_mark(volatile int* place, int number) {
    *place = number;
    __threadfence_system();
}
"""


class Progress:
    """The number of the last instruction that the GPU has reached. Made on the device that it is for."""

    def __init__(self) -> None:
        self._cupy = import_cupy()
        # Pinned memory has the same address on the device (unified addressing), and is not moved.
        self._memory = self._cupy.cuda.PinnedMemoryPointer(self._cupy.cuda.PinnedMemory(64), 0)
        self._number: Any = np.frombuffer(self._memory, np.int32, 1)
        self._place = ctypes.c_void_p(int(self._memory.ptr))
        kernel = self._cupy.RawKernel(_SOURCE, "onnxmesh_mark")
        kernel.compile()
        self._kernel = kernel.kernel
        self._number[0] = -1

    def mark(self, index: int, stream: int) -> None:
        """Enqueue on a stream: instruction `index` is reached. One kernel of about a microsecond, no allocation."""
        number = ctypes.c_int(index)
        arguments = (ctypes.c_void_p * 2)(ctypes.addressof(self._place), ctypes.addressof(number))
        self._cupy.cuda.driver.launchKernel(
            self._kernel.ptr, 1, 1, 1, 1, 1, 1, 0, stream, ctypes.addressof(arguments), 0
        )

    def last(self) -> int:
        """The number of the last instruction that is reached; -1 if there is none."""
        return int(self._number[0])


def where(program: Program, index: int) -> str:
    """An instruction in words: `instruction 14, AllToAll along cp of node 'attn'`."""
    if not 0 <= index < len(program.instructions):
        return "before its first collective"
    item = program.instructions[index]
    name = f"{item.kind} along {item.axis}" if isinstance(item, Collective) else item.kernel
    return f"at instruction {index}, {name} of node {item.node!r}"
