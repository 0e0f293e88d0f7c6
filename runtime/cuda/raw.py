"""CUDA kernels from source text, launched from raw pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from onnxmesh.runtime.cuda.codegen.operand import Source
from onnxmesh.runtime.cuda.codegen.prelude import DEVICE, MATH, PORTABLE
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.launchers import Launch, Workspace

Pointer = int | tuple[Workspace, int]
"""An address, or a place in a workspace, which is known when the kernel is launched: (workspace, offset)."""


def address(pointer: Pointer) -> int:
    """Where it points to now."""
    return pointer if isinstance(pointer, int) else pointer[0].ptr + pointer[1]


def bind(source: Source, prelude: str, ins: Sequence[Pointer], outs: Sequence[Pointer]) -> Launch:
    """What enqueues a kernel with these pointers, as `source.arguments` counts them; 0 for one that it does not read.

    The kernel stands behind the prelude of the generated ones and `prelude`. It is compiled here; CuPy keeps binaries.
    """
    cupy = import_cupy()
    kernel = _compiled(source, prelude, cupy.cuda.runtime.getDevice())
    pointers = [ins[n] if n >= 0 else outs[-1 - n] for n in source.arguments]
    values = [ctypes.c_void_p(p if isinstance(p, int) else 0) for p in pointers]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    scratch = [(value, p) for value, p in zip(values, pointers) if not isinstance(p, int)]
    driver, function, arguments = cupy.cuda.driver, kernel.kernel.ptr, ctypes.addressof(addresses)

    def launch(stream: int, _keep: Any = (kernel, values, addresses)) -> None:
        for value, pointer in scratch:
            value.value = address(pointer)
        driver.launchKernel(function, source.grid, 1, 1, source.block, 1, 1, 0, stream, arguments, 0)

    return launch


@lru_cache(maxsize=4096)
def _compiled(source: Source, prelude: str, device: int) -> Any:
    text = "".join((DEVICE, PORTABLE, MATH, prelude, source.code))
    kernel = import_cupy().RawKernel(text, source.name, options=("-std=c++17",))
    kernel.compile()
    return kernel
