"""Widening and rounding, shared by all families: narrow floats are computed in float32 and rounded once."""

from __future__ import annotations

from typing import Any

from onnxmesh.runtime.dtypes import is_narrow, wider
from onnxmesh.runtime.kernels.registry import Array, Call


def wide(xp: Any, x: Array) -> Array:
    """`x` in the dtype it is computed in: float32 for a narrow float, bytes for a small integer, else its own."""
    return x.astype(wider(x.dtype), copy=False)


def rounded(call: Call, value: Array, output: int = 0) -> Array:
    """`value` in the dtype of the output: the one rounding of a kernel."""
    return call.xp.asarray(value).astype(call.outs[output].dtype, copy=False)


def is_float(x: Array) -> bool:
    """Whether `x` holds real floats, narrow ones included."""
    return x.dtype.kind == "f" or is_narrow(x.dtype)
