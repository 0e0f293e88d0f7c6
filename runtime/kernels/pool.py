"""Pooling and resizing over the spatial dims of [n, c, spatial...]."""

from __future__ import annotations

import math
from typing import Any

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel
from onnxmesh.runtime.kernels.windows import padded, pads, spatial, windows


@kernel("MaxPool")
def max_pool(call: Call, x: Array) -> Array:
    """The maximum under every window; the output's shape says whether `ceil_mode` rounds up."""
    view, axes = _pool_view(call, call.xp, wide(call.xp, x), -math.inf)
    return rounded(call, view.max(axis=axes))


@kernel("AveragePool")
def average_pool(call: Call, x: Array) -> Array:
    """The mean under every window; padding counts only with `count_include_pad`."""
    xp, x = call.xp, wide(call.xp, x)
    view, axes = _pool_view(call, xp, x, 0)
    inside = bool(call.attrs.get("count_include_pad", 0))
    ones = xp.ones((1, 1, *x.shape[2:]), x.dtype)
    if inside:
        ones = padded(xp, ones, pads(call.attrs, x.shape[2:], call.attrs["kernel_shape"]), 1)
        count, _ = _pool_view(
            Call(xp, {**call.attrs, "pads": None, "auto_pad": "NOTSET"}, call.outs, call.coordinate), xp, ones, 0
        )
    else:
        count, _ = _pool_view(call, xp, ones, 0)
    return rounded(call, view.sum(axis=axes) / count.sum(axis=axes))


def _pool_view(call: Call, xp: Any, x: Array, value: float) -> tuple[Array, tuple[int, ...]]:
    taps, sizes = call.attrs["kernel_shape"], call.outs[0].shape[2:]
    strides, dilations = (spatial(call.attrs, name, len(taps)) for name in ("strides", "dilations"))
    widths = pads(call.attrs, x.shape[2:], taps)
    reach = [(o - 1) * s + (t - 1) * d + 1 for o, s, t, d in zip(sizes, strides, taps, dilations)]
    widths = [(a, max(b, r - n - a)) for (a, b), r, n in zip(widths, reach, x.shape[2:])]
    x = padded(xp, x, widths, value)
    return windows(xp, x, taps, strides, dilations, sizes), tuple(range(2, 2 + len(taps)))


@kernel("GlobalAveragePool")
def global_average_pool(call: Call, x: Array) -> Array:
    """The mean over all spatial dims."""
    return rounded(call, wide(call.xp, x).mean(axis=tuple(range(2, x.ndim)), keepdims=True))


@kernel("GlobalMaxPool")
def global_max_pool(call: Call, x: Array) -> Array:
    """The maximum over all spatial dims."""
    return rounded(call, wide(call.xp, x).max(axis=tuple(range(2, x.ndim)), keepdims=True))
