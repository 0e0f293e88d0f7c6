"""cuBLASLt through nvmath-python's bindings: one problem's descriptors, its algorithms, and the call.

Row-major D = A B is the column-major D^T = B^T A^T, so A and B change places and a bias runs along the library's rows
(https://docs.nvidia.com/cuda/cublas/#cublasltmatmul). Sums are float32 for narrower floats. float32 is multiplied as
float32, unless ONNXMESH_TF32=1 asks for TF32.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.gemm_problem import FLOATS, Epilogue, Operand, Problem

WORKSPACE = 32 << 20
"""Bytes that an algorithm may ask for: what NVIDIA recommends for Hopper."""
_ALGORITHM = 64
_EPILOGUES = {"": "DEFAULT", "relu": "RELU", "gelu": "GELU"}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How a problem is computed: the library's 64 bytes, and the bytes of workspace that it needs."""

    data: bytes
    workspace: int


@cache
def available() -> bool:
    """Whether cuBLASLt can be called. ONNXMESH_NO_CUBLASLT=1 says no."""
    if os.environ.get("ONNXMESH_NO_CUBLASLT"):
        return False
    try:
        version()
    except (ImportError, RuntimeError, OSError):
        return False
    return True


@cache
def version() -> int:
    """The version of the cuBLASLt that is loaded, as 130100 for 13.1."""
    from nvmath.bindings import cublasLt

    return int(cublasLt.get_version())


def tf32() -> bool:
    """Whether float32 problems may round their factors to TF32."""
    return os.environ.get("ONNXMESH_TF32", "0") not in ("", "0")


def has(epilogue: Epilogue) -> bool:
    """Whether cuBLASLt has such an epilogue: the residual is added before an activation, and its GELU is by tanh."""
    return epilogue.activation in _EPILOGUES and not (epilogue.activation and epilogue.residual)


class Product:
    """The descriptors of a problem on the current device.

    Args:
        problem: with an epilogue that the library `has`.
        bias: where the bias is, if the epilogue has one.
    """

    def __init__(self, problem: Problem, bias: int = 0) -> None:
        from nvmath import CudaDataType
        from nvmath.bindings import cublas, cublasLt

        self.problem = problem
        self._lt, self._types = cublasLt, CudaDataType
        self._handle = _handle(import_cupy().cuda.runtime.getDevice())
        double = problem.dtype == "float64"
        scale, number = (CudaDataType.CUDA_R_64F, np.float64) if double else (CudaDataType.CUDA_R_32F, np.float32)
        fast = problem.dtype == "float32" and tf32()
        kind = "COMPUTE_64F" if double else "COMPUTE_32F_FAST_TF32" if fast else "COMPUTE_32F"
        self._alpha = np.ones(1, number)
        self._beta = np.full(1, problem.epilogue.residual is not None, number)
        self._operation = cublasLt.matmul_desc_create(cublas.ComputeType[kind], scale)
        self._describe(problem, bias)
        p = problem
        self._a, self._b = self._layout(p.a, p.m, p.k), self._layout(p.b, p.k, p.n)
        self._out = self._layout(p.out, p.m, p.n)
        self._residual = self._layout(p.epilogue.residual or p.out, p.m, p.n)
        layouts = (self._a, self._b, self._out, self._residual)
        weakref.finalize(self, _destroy, cublasLt, self._operation, layouts).atexit = False

    def algorithms(self, count: int) -> list[Algorithm]:
        """Up to `count` that suit, the one first that the library believes the fastest; empty where it has none."""
        lt = self._lt
        found, returned = np.zeros(count, lt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
        preference = self._preference()
        try:
            lt.matmul_algo_get_heuristic(
                *(self._handle, self._operation, self._b, self._a, self._residual, self._out, preference, count),
                *(found.ctypes.data, returned.ctypes.data),
            )
        except lt.cuBLASLtError:
            return []
        finally:
            lt.matmul_preference_destroy(preference)
        good = [item for item in found[: int(returned[0])] if item["state"] == 0]
        return [Algorithm(item["algo"].tobytes(), int(item["workspace_size"])) for item in good]

    def check(self, data: bytes) -> Algorithm | None:
        """The algorithm of these 64 bytes, if it suits the problem."""
        if len(data) != _ALGORITHM:
            return None
        algorithm, result = _memory(data), np.zeros(1, self._lt.matmul_heuristic_result_dtype)
        try:
            self._lt.matmul_algo_check(
                *(self._handle, self._operation, self._b, self._a, self._residual, self._out),
                *(algorithm.ctypes.data, result.ctypes.data),
            )
        except self._lt.cuBLASLtError:
            return None
        needed = int(result[0]["workspace_size"])
        return Algorithm(data, needed) if needed <= WORKSPACE else None

    def bound(self, algorithm: Algorithm, addresses: Sequence[int]) -> BoundProduct:
        """The product of the matrices at these addresses: of a, b, out, bias if there is one, residual likewise."""
        return BoundProduct(self, algorithm, addresses)

    def _describe(self, problem: Problem, bias: int) -> None:
        lt, epilogue = self._lt, problem.epilogue
        get, put, names = lt.get_matmul_desc_attribute_dtype, lt.matmul_desc_set_attribute, lt.MatmulDescAttribute
        _set(put, get, self._operation, names.TRANSA, int(problem.b.transposed))
        _set(put, get, self._operation, names.TRANSB, int(problem.a.transposed))
        if problem.multiprocessors:
            _set(put, get, self._operation, names.SM_COUNT_TARGET, problem.multiprocessors)
        name = _EPILOGUES[epilogue.activation]
        if epilogue.bias:
            name = "BIAS" if name == "DEFAULT" else f"{name}_BIAS"
            _set(put, get, self._operation, names.BIAS_POINTER, bias)
            _set(put, get, self._operation, names.BIAS_DATA_TYPE, int(self._dtype(problem.dtype)))
        _set(put, get, self._operation, names.EPILOGUE, int(lt.Epilogue[name]))

    def _preference(self) -> int:
        lt, p = self._lt, self.problem
        preference = int(lt.matmul_preference_create())
        get, put = lt.get_matmul_preference_attribute_dtype, lt.matmul_preference_set_attribute
        names, residual = lt.MatmulPreferenceAttribute, p.epilogue.residual or p.out
        _set(put, get, preference, names.MAX_WORKSPACE_BYTES, WORKSPACE)
        for name, operand in {"A": p.b, "B": p.a, "C": residual, "D": p.out}.items():
            _set(put, get, preference, getattr(names, f"MIN_ALIGNMENT_{name}_BYTES"), operand.alignment)
        return preference

    def _layout(self, x: Operand, rows: int, columns: int) -> int:
        """The row-major matrices [rows, columns] of `x`, as the library sees them: transposed."""
        lt, p = self._lt, self.problem
        rows, columns = (columns, rows) if x.transposed else (rows, columns)
        layout = int(lt.matrix_layout_create(self._dtype(p.dtype), columns, rows, x.leading))
        get, put, names = lt.get_matrix_layout_attribute_dtype, lt.matrix_layout_set_attribute, lt.MatrixLayoutAttribute
        _set(put, get, layout, names.BATCH_COUNT, p.batch)
        _set(put, get, layout, names.STRIDED_BATCH_OFFSET, x.step)
        return layout

    def _dtype(self, name: str) -> Any:
        return getattr(self._types, f"CUDA_R_{'16BF' if name == 'bfloat16' else f'{8 * FLOATS[name]}F'}")


class BoundProduct:
    """A product of matrices in memory that stays; a call enqueues it."""

    def __init__(self, product: Product, algorithm: Algorithm, addresses: Sequence[int]) -> None:
        a, b, out, *rest = addresses
        epilogue, self._product = product.problem.epilogue, product  # which owns the descriptors
        residual = rest[epilogue.bias] if epilogue.residual else out
        self._algorithm, self._matmul = _memory(algorithm.data), product._lt.matmul
        self._before = (
            *(product._handle, product._operation, product._alpha.ctypes.data, b, product._b, a, product._a),
            *(product._beta.ctypes.data, residual, product._residual, out, product._out),
            self._algorithm.ctypes.data,
        )
        self._nbytes = algorithm.workspace

    def __call__(self, workspace: int, stream: int) -> None:
        """Enqueue on the stream of this pointer; the workspace has the algorithm's bytes."""
        self._matmul(*self._before, workspace, self._nbytes, stream)


@cache
def _handle(device: int) -> int:
    from nvmath.bindings import cublasLt

    return int(cublasLt.create())


def _memory(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint64).copy()


def _set(put: Any, get: Any, target: int, attribute: Any, value: int) -> None:
    data = np.array([value], get(attribute))
    put(target, attribute, data.ctypes.data, data.nbytes)


def _destroy(lt: Any, operation: int, layouts: Sequence[int]) -> None:
    lt.matmul_desc_destroy(operation)
    for layout in layouts:
        lt.matrix_layout_destroy(layout)
