"""Dtypes by name: NumPy's and ml_dtypes', what they are computed in, and ONNX Runtime's words for them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_NARROW = ("float16", "bfloat16", *_FLOAT8, "float4_e2m1fn")
_SMALL_INTEGERS = {"int4": "int8", "uint4": "uint8", "int2": "int8", "uint2": "uint8"}
_PLAIN = (
    *("bool", "float32", "float64", "complex64", "complex128"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
_DTYPES: dict[str, np.dtype] = {
    **{name: np.dtype(name) for name in _PLAIN},
    **{name: np.dtype(getattr(ml_dtypes, name, name)) for name in (*_NARROW, *_SMALL_INTEGERS)},
}
_NARROW_DTYPES = frozenset(_DTYPES[name] for name in _NARROW)
_FLOAT8_DTYPES = frozenset(_DTYPES[name] for name in _FLOAT8)
_WIDER = {_DTYPES[small]: _DTYPES[wider] for small, wider in _SMALL_INTEGERS.items()}
_ORT_NAMES = {"float32": "float", "float64": "double", "float8_e8m0fnu": "float8e8m0", "float4_e2m1fn": "float4e2m1"}


def dtype(name: str) -> np.dtype:
    """The dtype called `name`. Raises ValueError for a name that no plan may hold."""
    try:
        return _DTYPES[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown dtype {name!r}") from None


def is_narrow(dtype: Any) -> bool:
    """Whether `dtype` is a float of 16 bits or less: such values are computed in float32."""
    return dtype in _NARROW_DTYPES


def is_float8(dtype: Any) -> bool:
    """Whether `dtype` is one of the 8-bit floats."""
    return dtype in _FLOAT8_DTYPES


def is_small_integer(dtype: Any) -> bool:
    """Whether `dtype` is an integer of less than 8 bits. In memory an element has a byte; files pack them."""
    return dtype in _WIDER


def is_for_hosts(dtype: Any) -> bool:
    """Whether NumPy has arrays of this dtype, by ml_dtypes, and CuPy has none: floats and integers of 8 bits or less
    that are not NumPy's own."""
    return dtype.isbuiltin == 2 and dtype.itemsize == 1


def wider(dtype: Any) -> Any:
    """The dtype that values of `dtype` are computed in: float32 for narrow floats, bytes for small integers."""
    return _DTYPES["float32"] if is_narrow(dtype) else _WIDER.get(dtype, dtype)


def limits(dtype: Any) -> tuple[int, int]:
    """The least and the greatest number of an integer dtype."""
    info = ml_dtypes.iinfo(dtype)
    return int(info.min), int(info.max)


def float_max(dtype: Any) -> float:
    """The largest finite number of a float dtype."""
    return float(ml_dtypes.finfo(dtype).max)


def ort_type(name: str) -> str:
    """The dtype as ONNX Runtime writes it: `tensor(float)` for `float32`."""
    return f"tensor({_ORT_NAMES.get(name, name.replace('_', ''))})"


def from_ort(name: str) -> np.dtype:
    """The dtype that ONNX Runtime calls so: `float32` for `float`. Raises ValueError for an unknown name."""
    for own, found in _DTYPES.items():
        if ort_type(own) == f"tensor({name})":
            return found
    raise ValueError(f"unknown element type {name!r}")
