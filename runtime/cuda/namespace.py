"""The array namespace that kernels are given on a GPU: CuPy, with what a CUDA graph cannot capture replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxmesh.runtime.cuda import einsum, gemm
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

    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """As CuPy's, piece by piece: for many pieces CuPy would copy their addresses from the host."""
        first = arrays[0]
        if any(x.dtype != first.dtype for x in arrays):
            return self._cupy.concatenate(arrays, axis)
        axis %= first.ndim
        shape = (*first.shape[:axis], sum(x.shape[axis] for x in arrays), *first.shape[axis + 1 :])
        out, start = self._cupy.empty(shape, first.dtype), 0
        for x in arrays:
            out[(slice(None),) * axis + (slice(start, start + x.shape[axis]),)] = x
            start += x.shape[axis]
        return out

    def einsum(self, equation: str, *operands: Array, optimize: Any = True) -> Array:
        """As CuPy's, by products of matrices."""
        result = einsum.contract(self, equation, operands)
        return self._cupy.einsum(equation, *operands, optimize=optimize) if result is None else result

    def matmul(self, a: Array, b: Array) -> Array:
        """As CuPy's, through cuBLASLt where it is there."""
        return gemm.matmul(self._cupy, a, b)
