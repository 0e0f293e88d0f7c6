"""QuantizeLinear and DequantizeLinear: one scale a tensor, an axis, or a block; UnpackBits for packed weights."""

from __future__ import annotations

from typing import Any

from onnxmesh.runtime.dtypes import dtype, is_narrow, limits
from onnxmesh.runtime.kernels.cast import converted
from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("QuantizeLinear")
def quantize_linear(call: Call, x: Array, scale: Array, zero: Array | None = None) -> Array:
    """round(x / scale) + zero, saturated to the output's dtype; floats of 8 and 4 bits are rounded as by Cast.

    x is float or int32. The attribute `precision`, a dtype's name, is what x / scale is rounded to; without it that is
    the scale's dtype.
    """
    xp, target = call.xp, call.outs[0].dtype
    y = _quotient(call, x, scale)
    if is_narrow(target):
        y = y if zero is None else y + _spread(call, x, wide(xp, zero))
        return converted(xp, y, target, bool(call.attrs.get("saturate", 1)))
    y = xp.rint(y)
    y = y if zero is None else y + _spread(call, x, zero.astype(y.dtype))
    return rounded(call, xp.clip(y, *limits(target)))


def _quotient(call: Call, x: Array, scale: Array) -> Array:
    xp = call.xp
    name = call.attrs.get("precision", "")
    precision = dtype(name) if name else scale.dtype
    y = _float(xp, x) / _spread(call, x, _float(xp, scale))
    exact = precision.itemsize == 1 or precision.kind == "i"  # powers of two, integers: the quotient is a float
    return y if exact else wide(xp, y.astype(precision))


def _float(xp: Any, x: Array) -> Array:
    """As float32, in which 32-bit integers would lose bits: these as float64."""
    return x.astype(xp.float64 if x.dtype == xp.int32 else xp.float32)


@kernel("DequantizeLinear")
def dequantize_linear(call: Call, x: Array, scale: Array, zero: Array | None = None) -> Array:
    """(x - zero) * scale, of integers or narrow floats x."""
    xp, x = call.xp, wide(call.xp, x)
    y = x if zero is None else _difference(call, x, zero)
    return rounded(call, y.astype(xp.float32) * _spread(call, x, wide(xp, scale)))


def _difference(call: Call, x: Array, zero: Array) -> Array:
    """x - zero, exactly: of integers in int32."""
    xp, zero = call.xp, wide(call.xp, zero)
    if x.dtype.kind in "iu":
        x, zero = x.astype(xp.int32), zero.astype(xp.int32)
    return x - _spread(call, x, zero)


def _spread(call: Call, x: Array, values: Array) -> Array:
    """One value a tensor, an axis (`axis`, default 1) or a block of it (`block_size`), to broadcast with x."""
    if values.size == 1 and values.ndim <= 1:
        return values.reshape(())
    axis, block = call.attrs.get("axis", 1) % x.ndim, call.attrs.get("block_size", 0)
    if not block:
        return values.reshape(-1, *[1] * (x.ndim - 1 - axis))
    spread = call.xp.repeat(values, block, axis=axis)
    return spread[(slice(None),) * axis + (slice(0, x.shape[axis]),)]


@kernel("UnpackBits")
def unpack_bits(call: Call, x: Array) -> Array:
    """The numbers of `bits` bits in bytes x [..., n], lowest bits first: uint8 [..., n * 8 / bits]."""
    xp, bits = call.xp, call.attrs["bits"]
    numbers = xp.empty((*x.shape, 8 // bits), xp.uint8)
    for i in range(8 // bits):
        numbers[..., i] = (x >> xp.uint8(bits * i)) & xp.uint8((1 << bits) - 1)
    return numbers.reshape(call.outs[0].shape)
