"""The array namespace that kernels are given on a GPU: CuPy, with what a CUDA graph cannot capture replaced."""

from __future__ import annotations

from typing import Any

from onnxmesh.runtime.cuda import gemm
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.kernels.registry import Array


class Namespace:
    """`cupy`, except for the functions below."""

    __name__ = "cupy"

    def __init__(self) -> None:
        self._cupy = import_cupy()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cupy, name)

    def asarray(self, value: Any, dtype: Any = None) -> Array:
        """As CuPy's, but a Python number is written by a kernel and not copied from the host."""
        if isinstance(value, bool | int | float):
            return self._cupy.full((), value, dtype or type(value))
        return self._cupy.asarray(value, dtype)

    def matmul(self, a: Array, b: Array) -> Array:
        """As CuPy's, through cuBLASLt where it is there."""
        return gemm.matmul(self._cupy, a, b)
