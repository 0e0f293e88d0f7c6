"""Kernels that a GPU does in another way than the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import onnxmesh.runtime.kernels  # noqa: F401  (registers the generic ones)
from onnxmesh.runtime.cuda import gemm
from onnxmesh.runtime.dtypes import is_narrow
from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, Kernel, find, kernel


@kernel("MatMul", backend="cupy")
def matmul(call: Call, a: Array, b: Array) -> Array:
    """a [..., m, k] times b [..., k, n]. Half precision goes to cuBLASLt as it is: it sums in float32."""
    if gemm.takes(a, b):
        return rounded(call, gemm.matmul(call.xp, a, b))
    return rounded(call, call.xp.matmul(wide(call.xp, a), wide(call.xp, b)))


_FEW = 256
"""Up to so many entries TopK compares each with each."""


@kernel("TopK", backend="cupy")
def top_k(call: Call, x: Array) -> tuple[Array, Array]:
    """As the generic kernel, without a sort, which waits for the device: an entry's place is how many come before."""
    xp, axis, largest = call.xp, call.attrs.get("axis", -1) % x.ndim, call.attrs.get("largest", 1)
    if x.shape[axis] > _FEW:
        return find("TopK")(call, x)
    keys = xp.moveaxis(wide(xp, x), axis, -1)
    this, other, at = keys[..., :, None], keys[..., None, :], xp.arange(keys.shape[-1])
    this_nan, other_nan = this != this, other != other
    before = (other > this) | (other_nan & ~this_nan) if largest else (other < this) | (this_nan & ~other_nan)
    same = (other == this) | (this_nan & other_nan)
    place = xp.sum(before | (same & (at[None, :] < at[:, None])), axis=-1)
    chosen = place[..., None, :] == xp.arange(call.attrs["k"])[:, None]
    order = xp.moveaxis(xp.sum(chosen * at, axis=-1), -1, axis)
    return xp.take_along_axis(x, order, axis=axis), rounded(call, order, 1)


_ATOMIC = frozenset(("int32", "uint32", "uint64", "float32", "float64"))
"""The dtypes that CuPy scatters with a reduction."""


def _scatter(op: str) -> Kernel:
    """As the generic kernel; products and dtypes that CuPy cannot scatter go through the host."""
    generic = find(op)

    def scatter(call: Call, *arrays: Array) -> Array:
        reduction, dtype = call.attrs.get("reduction", "none"), arrays[0].dtype
        if reduction == "none" or (reduction != "mul" and (is_narrow(dtype) or dtype.name in _ATOMIC)):
            return generic(call, *arrays)
        return call.xp.asarray(generic(replace(call, xp=np), *(x.get() for x in arrays)))

    return scatter


for _op in ("ScatterND", "ScatterElements"):
    kernel(_op, backend="cupy")(_scatter(_op))
