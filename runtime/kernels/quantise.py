"""QuantizeLinear and DequantizeLinear: one scale a tensor, an axis, or a block."""

from __future__ import annotations

from onnxmesh.runtime.dtypes import float_max, is_float8
from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("QuantizeLinear")
def quantize_linear(call: Call, x: Array, scale: Array, zero: Array | None = None) -> Array:
    """round(x / scale) + zero, saturated to the output's dtype."""
    xp, target = call.xp, call.outs[0].dtype
    y = wide(xp, x).astype(xp.float32) / _spread(call, x, wide(xp, scale))
    if is_float8(target):
        return rounded(call, xp.clip(y, -float_max(target), float_max(target)))
    y = xp.rint(y)
    y = y if zero is None else y + _spread(call, x, zero.astype(xp.float32))
    limits = xp.iinfo(target)
    return rounded(call, xp.clip(y, limits.min, limits.max))


@kernel("DequantizeLinear")
def dequantize_linear(call: Call, x: Array, scale: Array, zero: Array | None = None) -> Array:
    """(x - zero) * scale."""
    xp = call.xp
    y = x.astype(xp.float32)
    y = y if zero is None else y - _spread(call, x, zero.astype(xp.float32))
    return rounded(call, y * _spread(call, x, wide(xp, scale)))


def _spread(call: Call, x: Array, values: Array) -> Array:
    """One value a tensor, an axis (`axis`, default 1) or a block of it (`block_size`), to broadcast with x."""
    if values.size == 1 and values.ndim <= 1:
        return values.reshape(())
    axis, block = call.attrs.get("axis", 1) % x.ndim, call.attrs.get("block_size", 0)
    if not block:
        return values.reshape(-1, *[1] * (x.ndim - 1 - axis))
    spread = call.xp.repeat(values, block, axis=axis)
    return spread[(slice(None),) * axis + (slice(0, x.shape[axis]),)]
