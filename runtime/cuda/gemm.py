"""Matrix products through cuBLASLt, which can be captured in a CUDA graph as CuPy's own cannot.

The bindings are nvmath-python's; without them, and for what they are not asked for (integers, vectors), CuPy does
the work. Row-major D = A B is the column-major D^T = B^T A^T, so A and B change places
(https://docs.nvidia.com/cuda/cublas/#cublasltmatmul). Sums are float32 for narrower floats; TF32 is off.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np

from onnxmesh.runtime.kernels.registry import Array

_WORKSPACE = 32 << 20
_FULL_ALIGNMENT = 256
_ELEMENTS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@cache
def available() -> bool:
    """Whether cuBLASLt can be called."""
    return _library() is not None


def takes(a: Array, b: Array) -> bool:
    """Whether cuBLASLt multiplies these: matrices of one float dtype."""
    return a.dtype == b.dtype and a.dtype.name in _ELEMENTS and a.ndim >= 2 and b.ndim >= 2 and available()


def matmul(xp: Any, a: Array, b: Array) -> Array:
    """a [..., m, k] times b [..., k, n], as numpy.matmul."""
    if not takes(a, b):
        return xp.matmul(a, b)
    (m, k), n = a.shape[-2:], b.shape[-1]
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = xp.empty((*batch, m, n), a.dtype)
    if out.size == 0 or k == 0:
        out.fill(0)
    elif prod(b.shape[:-2]) == 1:  # a weight: all rows at once
        _multiply(xp, a.reshape(-1, k)[None], b.reshape(k, n)[None], out.reshape(1, -1, n))
    else:
        a, b = (xp.broadcast_to(x, (*batch, *x.shape[-2:])).reshape(-1, *x.shape[-2:]) for x in (a, b))
        _multiply(xp, a, b, out.reshape(-1, m, n))
    return out


@dataclass(frozen=True, slots=True)
class _Operand:
    """A batch of matrices: read as they are, or transposed; `step` elements from one to the next."""

    transposed: bool
    leading: int
    step: int
    alignment: int


@dataclass(frozen=True, slots=True)
class _Problem:
    dtype: str
    m: int
    n: int
    k: int
    batch: int
    a: _Operand
    b: _Operand
    alignment: int


def _multiply(xp: Any, a: Array, b: Array, out: Array) -> None:
    """out[i] = a[i] b[i]; out is contiguous."""
    library = _library()
    a, first = _operand(xp, a)
    b, second = _operand(xp, b)
    problem = _Problem(
        a.dtype.name, a.shape[1], b.shape[2], a.shape[2], len(a), first, second, _alignment(out.data.ptr)
    )
    workspace = xp.empty(_WORKSPACE, xp.uint8)
    device = xp.cuda.runtime.getDevice()
    library.run(device, problem, a.data.ptr, b.data.ptr, out.data.ptr, workspace, xp.cuda.get_current_stream().ptr)


def _operand(xp: Any, x: Array) -> tuple[Array, _Operand]:
    """x [batch, rows, columns] as cuBLASLt can read it: rows or columns contiguous; else copied."""
    _, rows, columns = x.shape
    item, (step, row, column) = x.itemsize, x.strides
    if (column == item or columns == 1) and row >= columns * item:
        return x, _Operand(False, row // item, step // item, _alignment(x.data.ptr))
    if (row == item or rows == 1) and column >= rows * item:
        return x, _Operand(True, column // item, step // item, _alignment(x.data.ptr))
    x = xp.ascontiguousarray(x)
    return x, _Operand(False, columns, rows * columns, _alignment(x.data.ptr))


def _alignment(pointer: int) -> int:
    return min(_FULL_ALIGNMENT, pointer & -pointer)


@cache
def _library() -> Any:
    """cuBLASLt's bindings behind one function, or None."""
    if os.environ.get("ONNXMESH_NO_CUBLASLT"):
        return None
    try:
        return _Library()
    except (ImportError, RuntimeError, OSError):
        return None


class _Library:
    def __init__(self) -> None:
        from nvmath import CudaDataType
        from nvmath.bindings import cublas, cublasLt

        self._lt, self._compute, self._types = cublasLt, cublas.ComputeType, CudaDataType
        self._handles: dict[int, int] = {}
        self._plans: dict[tuple[int, _Problem], tuple[Any, ...]] = {}

    def run(self, device: int, problem: _Problem, a: int, b: int, out: int, workspace: Array, stream: int) -> None:
        """Enqueue the product; the algorithm is looked up the first time."""
        if device not in self._handles:
            self._handles[device] = self._lt.create()
        handle, key = self._handles[device], (device, problem)
        if key not in self._plans:
            self._plans[key] = self._plan(handle, problem)
        operation, la, lb, lc, algorithm, one, zero = self._plans[key]
        self._lt.matmul(
            *(handle, operation, one.ctypes.data, b, lb, a, la, zero.ctypes.data, out, lc, out, lc),
            *(algorithm["algo"].ctypes.data, workspace.data.ptr, workspace.nbytes, stream),
        )

    def _plan(self, handle: int, p: _Problem) -> tuple[Any, ...]:
        lt = self._lt
        double = p.dtype == "float64"
        scale = self._types.CUDA_R_64F if double else self._types.CUDA_R_32F
        compute = self._compute.COMPUTE_64F if double else self._compute.COMPUTE_32F
        operation = lt.matmul_desc_create(compute, scale)
        get, put, names = lt.get_matmul_desc_attribute_dtype, lt.matmul_desc_set_attribute, lt.MatmulDescAttribute
        _set(put, get, operation, names.TRANSA, int(p.b.transposed))
        _set(put, get, operation, names.TRANSB, int(p.a.transposed))
        la = self._layout(p, p.a, p.m, p.k)
        lb = self._layout(p, p.b, p.k, p.n)
        lc = self._layout(p, _Operand(False, p.n, p.m * p.n, p.alignment), p.m, p.n)
        preference = lt.matmul_preference_create()
        get, put = lt.get_matmul_preference_attribute_dtype, lt.matmul_preference_set_attribute
        wanted = lt.MatmulPreferenceAttribute
        _set(put, get, preference, wanted.MAX_WORKSPACE_BYTES, _WORKSPACE)
        alignments = {"A": p.b.alignment, "B": p.a.alignment, "C": p.alignment, "D": p.alignment}
        for name, alignment in alignments.items():
            _set(put, get, preference, getattr(wanted, f"MIN_ALIGNMENT_{name}_BYTES"), alignment)
        found, count = np.zeros(1, lt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
        lt.matmul_algo_get_heuristic(
            *(handle, operation, lb, la, lc, lc, preference, 1, found.ctypes.data, count.ctypes.data)
        )
        lt.matmul_preference_destroy(preference)
        if not count[0]:
            raise RuntimeError(f"cuBLASLt has no algorithm for {p}")
        number = np.float64 if double else np.float32
        return operation, la, lb, lc, found, np.ones(1, number), np.zeros(1, number)

    def _layout(self, p: _Problem, x: _Operand, rows: int, columns: int) -> int:
        """The row-major matrix [rows, columns] of memory order `x`, as cuBLASLt sees it: its transpose."""
        lt = self._lt
        kind = getattr(self._types, f"CUDA_R_{'16BF' if p.dtype == 'bfloat16' else f'{8 * _ELEMENTS[p.dtype]}F'}")
        rows, columns = (columns, rows) if x.transposed else (rows, columns)
        layout = lt.matrix_layout_create(kind, columns, rows, x.leading)
        get, put, names = lt.get_matrix_layout_attribute_dtype, lt.matrix_layout_set_attribute, lt.MatrixLayoutAttribute
        _set(put, get, layout, names.BATCH_COUNT, p.batch)
        _set(put, get, layout, names.STRIDED_BATCH_OFFSET, x.step)
        return int(layout)


def _set(put: Any, get: Any, target: int, attribute: Any, value: int) -> None:
    data = np.array([value], get(attribute))
    put(target, attribute, data.ctypes.data, data.nbytes)
