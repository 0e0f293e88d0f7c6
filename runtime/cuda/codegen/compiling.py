"""From a kernel's source to what launches it, through NVRTC.

CuPy keeps what NVRTC made in a folder, by source, options and GPU: `~/.cupy/kernel_cache`, or `CUPY_CACHE_DIR`. So a
plan's kernels are compiled once on a machine. Within a process equal sources are one kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from onnxmesh.runtime.cuda.codegen.operand import Source
from onnxmesh.runtime.cuda.codegen.prelude import DEVICE, MATH, PORTABLE
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.launchers import Launch

OPTIONS = ("-std=c++17",)
"""NVRTC's options. Not `--use_fast_math`: approximations stand in the prelude, where half precision allows them."""


def whole(source: Source) -> str:
    """The text that NVRTC gets."""
    return f"{DEVICE}{PORTABLE}{MATH}\n{source.code}"


def enqueue(source: Source, addresses: Sequence[int]) -> Launch:
    """What launches a kernel on these addresses, which stand in the order of its parameters."""
    if source.grid == 0:
        return lambda stream: None
    driver = import_cupy().cuda.driver
    function = _function(source, import_cupy().cuda.runtime.getDevice())
    values = (ctypes.c_void_p * len(addresses))(*addresses)
    size = ctypes.sizeof(ctypes.c_void_p)
    slots = (ctypes.c_void_p * len(addresses))(*(ctypes.addressof(values) + i * size for i in range(len(addresses))))
    handle, grid, block, parameters = function.kernel.ptr, source.grid, source.block, ctypes.addressof(slots)

    def launch(stream: int, _keep: Any = (function, values, slots)) -> None:
        driver.launchKernel(handle, grid, 1, 1, block, 1, 1, 0, stream, parameters, 0)

    return launch


@cache
def _function(source: Source, device: int) -> Any:
    """The kernel on a GPU."""
    module = import_cupy().RawModule(code=whole(source), options=OPTIONS, backend="nvrtc")
    return module.get_function(source.name)
