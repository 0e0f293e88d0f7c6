"""cuBLASLt's bindings as far as they are used, on host memory: column-major products by NumPy."""

from __future__ import annotations

import ctypes
import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

CudaDataType = IntEnum("CudaDataType", "CUDA_R_32F CUDA_R_64F CUDA_R_16F CUDA_R_16BF")
ComputeType = IntEnum("ComputeType", "COMPUTE_32F COMPUTE_64F COMPUTE_32F_FAST_TF32")
Epilogue = IntEnum("Epilogue", "DEFAULT RELU BIAS RELU_BIAS GELU GELU_BIAS")
MatmulDescAttribute = IntEnum(
    "MatmulDescAttribute", "TRANSA TRANSB EPILOGUE BIAS_POINTER BIAS_DATA_TYPE SM_COUNT_TARGET"
)
MatrixLayoutAttribute = IntEnum("MatrixLayoutAttribute", "BATCH_COUNT STRIDED_BATCH_OFFSET")
MatmulPreferenceAttribute = IntEnum(
    "MatmulPreferenceAttribute", ["MAX_WORKSPACE_BYTES", *(f"MIN_ALIGNMENT_{x}_BYTES" for x in "ABCD")]
)
RESULT = np.dtype([("algo", np.uint64, (8,)), ("workspace_size", np.uint64), ("state", np.int32)], align=True)
_NUMBERS = {CudaDataType.CUDA_R_32F: np.float32, CudaDataType.CUDA_R_64F: np.float64}
_WORKSPACE = 512


class Error(Exception):
    """What the bindings raise."""


class Library:
    """The functions of nvmath.bindings.cublasLt; handles are numbers of objects that live here."""

    cuBLASLtError = Error  # noqa: N815
    matmul_heuristic_result_dtype = RESULT

    def __init__(self) -> None:
        self.objects: dict[int, dict[Any, int]] = {}
        for kind in (Epilogue, MatmulDescAttribute, MatrixLayoutAttribute, MatmulPreferenceAttribute):
            setattr(self, kind.__name__, kind)

    def _new(self, **values: int) -> int:
        number = 1000 + len(self.objects)
        self.objects[number] = dict(values)
        return number

    def get_version(self) -> int:
        return 130100

    def create(self) -> int:
        return self._new()

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        return self._new(compute=compute, scale=scale)

    def matrix_layout_create(self, kind: int, rows: int, columns: int, leading: int) -> int:
        assert leading >= rows
        return self._new(kind=kind, rows=rows, columns=columns, leading=leading)

    def matmul_preference_create(self) -> int:
        return self._new()

    def destroy(self, number: int) -> None:
        del self.objects[number]

    matmul_desc_destroy = matrix_layout_destroy = matmul_preference_destroy = destroy

    def get_attribute_dtype(self, attribute: IntEnum) -> Any:
        wide = attribute.name in ("BIAS_POINTER", "STRIDED_BATCH_OFFSET", "MAX_WORKSPACE_BYTES")
        return np.int64 if wide else np.int32

    get_matmul_desc_attribute_dtype = get_attribute_dtype
    get_matrix_layout_attribute_dtype = get_matmul_preference_attribute_dtype = get_attribute_dtype

    def set_attribute(self, number: int, attribute: IntEnum, address: int, nbytes: int) -> None:
        data = (ctypes.c_byte * nbytes).from_address(address)
        self.objects[number][attribute] = int(np.frombuffer(data, self.get_attribute_dtype(attribute))[0])

    matmul_desc_set_attribute = matrix_layout_set_attribute = matmul_preference_set_attribute = set_attribute

    def matmul_algo_get_heuristic(self, *arguments: int) -> None:
        """Two algorithms, or as many as are asked for."""
        *_, count, results, returned = arguments
        given = min(count, 2)
        for i in range(given):
            result = np.zeros(1, RESULT)
            result["algo"], result["workspace_size"] = i + 1, _WORKSPACE
            ctypes.memmove(results + i * RESULT.itemsize, result.ctypes.data, RESULT.itemsize)
        ctypes.c_int32.from_address(returned).value = given

    def matmul_algo_check(self, *arguments: int) -> None:
        *_, algorithm, result = arguments
        if ctypes.c_uint64.from_address(algorithm).value > 2:
            raise Error("no such algorithm")
        checked = np.zeros(1, RESULT)
        checked["workspace_size"] = _WORKSPACE
        ctypes.memmove(result, checked.ctypes.data, RESULT.itemsize)

    def matmul(self, handle: int, operation: int, alpha: int, *rest: int) -> None:
        """D = epilogue(alpha op(A) op(B) + beta C), all column-major."""
        a, la, b, lb, beta, c, lc, d, ld, algorithm, _, nbytes, _ = rest
        assert handle in self.objects and nbytes == _WORKSPACE
        assert 1 <= ctypes.c_uint64.from_address(algorithm).value <= 2
        what, number = self.objects[operation], _NUMBERS[CudaDataType(self.objects[operation]["scale"])]
        first, second = self._matrices(a, la), self._matrices(b, lb)
        first = first.swapaxes(1, 2) if what.get(MatmulDescAttribute.TRANSA) else first
        second = second.swapaxes(1, 2) if what.get(MatmulDescAttribute.TRANSB) else second
        one, other = (np.frombuffer((ctypes.c_byte * 8).from_address(x), number)[0] for x in (alpha, beta))
        value = one * (first @ second)
        value = value + other * self._matrices(c, lc) if other else value
        out = self._matrices(d, ld)
        name = Epilogue(what[MatmulDescAttribute.EPILOGUE]).name
        if "BIAS" in name:
            address, rows = what[MatmulDescAttribute.BIAS_POINTER], out.shape[1]
            data = (ctypes.c_byte * (out.itemsize * rows)).from_address(address)
            value = value + np.frombuffer(data, out.dtype)[None, :, None]
        out[...] = np.maximum(value, 0) if "RELU" in name else value

    def _matrices(self, address: int, layout: int) -> np.ndarray:
        """The column-major matrices [batch, rows, columns] at an address."""
        what = self.objects[layout]
        number = _NUMBERS[CudaDataType(what["kind"])]
        shape = (what[MatrixLayoutAttribute.BATCH_COUNT], what["rows"], what["columns"])
        steps = (what[MatrixLayoutAttribute.STRIDED_BATCH_OFFSET], 1, what["leading"])
        strides = [step * np.dtype(number).itemsize for step in steps]
        span = sum((size - 1) * stride for size, stride in zip(shape, strides)) + np.dtype(number).itemsize
        memory = (ctypes.c_byte * span).from_address(address)
        return np.ndarray(shape, number, buffer=memory, strides=strides)


def install(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Put it in the place of nvmath-python, and NumPy in CuPy's."""
    from onnxmesh.runtime.cuda import cublaslt

    library = Library()
    bindings = ModuleType("nvmath.bindings")
    bindings.cublasLt, bindings.cublas = library, SimpleNamespace(ComputeType=ComputeType)  # type: ignore[attr-defined]
    package = ModuleType("nvmath")
    package.CudaDataType, package.bindings = CudaDataType, bindings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvmath", package)
    monkeypatch.setitem(sys.modules, "nvmath.bindings", bindings)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0)))
    monkeypatch.setattr(cublaslt, "import_cupy", lambda: cupy)
    monkeypatch.delenv("ONNXMESH_NO_CUBLASLT", raising=False)
    for cached in (cublaslt.available, cublaslt.version, cublaslt._handle):
        cached.cache_clear()
    return library
