"""Dtypes by name: NumPy's and ml_dtypes', which of them are narrow floats, and ONNX Runtime's words for them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

_NARROW = (
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_PLAIN = (
    *("bool", "float32", "float64", "complex64", "complex128"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
_DTYPES: dict[str, np.dtype] = {
    **{name: np.dtype(name) for name in _PLAIN},
    **{name: np.dtype(getattr(ml_dtypes, name, name)) for name in _NARROW},
}
_NARROW_DTYPES = frozenset(_DTYPES[name] for name in _NARROW)
_ORT_NAMES = {"float32": "float", "float64": "double"}


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
    return is_narrow(dtype) and dtype.itemsize == 1


def float_max(dtype: Any) -> float:
    """The largest finite number of a float dtype."""
    return float(ml_dtypes.finfo(dtype).max)


def ort_type(name: str) -> str:
    """The dtype as ONNX Runtime writes it: `tensor(float)` for `float32`."""
    return f"tensor({_ORT_NAMES.get(name, name.replace('_', ''))})"
