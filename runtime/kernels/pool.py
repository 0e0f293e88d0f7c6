"""Pooling over the spatial dims of [n, c, spatial...].

A window's maximum or sum is taken along one dim after another: loops over taps, each step an operation on whole arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from onnxmesh.runtime.kernels.numeric import is_float, rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel
from onnxmesh.runtime.kernels.windows import padded, pads, spatial, tap_of

Widths = list[tuple[int, int]]


@dataclass(frozen=True)
class _Windows:
    """The windows of a pool, all lists with one entry a spatial dim; `ends` is what the last windows reach over."""

    taps: list[int]
    strides: list[int]
    dilations: list[int]
    pads: Widths
    ends: Widths
    sizes: tuple[int, ...]

    def fold(self, x: Array, combine: Callable[[Array, Array], Array]) -> Array:
        """x [n, c, padded...] with what is under every window combined: [n, c, sizes...]."""
        for i in range(len(self.taps)):
            x = self.fold_dim(x, i, combine)
        return x

    def fold_dim(self, x: Array, dim: int, combine: Callable[[Array, Array], Array]) -> Array:
        """The same along one spatial dim."""
        result = self.under(x, dim, 0)
        for tap in range(1, self.taps[dim]):
            result = combine(result, self.under(x, dim, tap))
        return result

    def under(self, x: Array, dim: int, tap: int) -> Array:
        """What stands under a tap along a spatial dim."""
        return tap_of(x, 2 + dim, tap, self.strides[dim], self.dilations[dim], self.sizes[dim])

    def positions(self, xp: Any, dim: int) -> Array:
        """Where in the source every tap of every window stands along a dim: [size, taps]; outside in the padding."""
        starts = xp.arange(self.sizes[dim]) * self.strides[dim] - self.pads[dim][0]
        return starts[:, None] + xp.arange(self.taps[dim]) * self.dilations[dim]


def _windows(call: Call, x: Array) -> _Windows:
    """The output's shape says whether `ceil_mode` rounds up; then windows reach beyond the padding."""
    taps, sizes = list(call.attrs["kernel_shape"]), call.outs[0].shape[2:]
    strides, dilations = (spatial(call.attrs, name, len(taps)) for name in ("strides", "dilations"))
    widths = pads(call.attrs, x.shape[2:], taps)
    reach = [(o - 1) * s + (t - 1) * d + 1 for o, s, t, d in zip(sizes, strides, taps, dilations)]
    ends = [(a, max(b, r - n - a)) for (a, b), r, n in zip(widths, reach, x.shape[2:])]
    return _Windows(taps, strides, dilations, widths, ends, sizes)


@kernel("MaxPool")
def max_pool(call: Call, x: Array) -> Array | tuple[Array, Array]:
    """The maximum under every window, and where in its plane [spatial...] the first such entry stands (int64).

    Places count along rows, with `storage_order` 1 along columns (the first spatial dim is the fastest).
    """
    xp, x = call.xp, wide(call.xp, x)
    windows = _windows(call, x)
    y = padded(xp, x, windows.ends, -math.inf if is_float(x) else int(xp.iinfo(x.dtype).min))
    if len(call.outs) == 1:
        return rounded(call, windows.fold(y, xp.maximum))
    place = xp.zeros((1,) * x.ndim, xp.int64)
    for dim, step in reversed(list(enumerate(_steps(x.shape[2:], call.attrs.get("storage_order", 0))))):
        y, place = _max_along(xp, windows, y, place, dim, step)
    return rounded(call, y), rounded(call, place, 1)


def _max_along(xp: Any, windows: _Windows, y: Array, place: Array, dim: int, step: int) -> tuple[Array, Array]:
    """The maximum along one dim, and its place: what `place` says, plus `step` an entry of this dim."""
    at = windows.positions(xp, dim) * step
    at = at.reshape(*at.shape[:1], *(1,) * (y.ndim - 3 - dim), at.shape[1])
    place = xp.broadcast_to(place, y.shape)
    best, found = windows.under(y, dim, 0), windows.under(place, dim, 0) + at[..., 0]
    for tap in range(1, windows.taps[dim]):
        value = windows.under(y, dim, tap)
        better = value > best
        found = xp.where(better, windows.under(place, dim, tap) + at[..., tap], found)
        best = xp.where(better, value, best)
    return best, found


def _steps(sizes: Sequence[int], storage_order: int) -> list[int]:
    """How far apart neighbours along every dim are in the flat plane."""
    if storage_order:
        return [1, *accumulate(sizes[:-1], lambda a, b: a * b)]
    return list(reversed([1, *accumulate(reversed(sizes[1:]), lambda a, b: a * b)]))


@kernel("MaxUnpool")
def max_unpool(call: Call, x: Array, place: Array) -> Array:
    """Zeros, but for x at `place` of the plane that a MaxPool with these attributes came from.

    The output may be larger than this plane, which then stands at its beginning.
    """
    xp, attrs, taps = call.xp, call.attrs, call.attrs["kernel_shape"]
    strides = spatial(attrs, "strides", len(taps))
    widths = pads(attrs, x.shape[2:], taps)
    sizes = [(n - 1) * s + t - a - b for n, s, t, (a, b) in zip(x.shape[2:], strides, taps, widths)]
    planes = math.prod(x.shape[:2])
    flat = xp.zeros((planes, math.prod(sizes)), x.dtype)
    flat[xp.arange(planes)[:, None], place.reshape(planes, -1)] = x.reshape(planes, -1)
    out = xp.zeros(call.outs[0].shape, x.dtype)
    out[(..., *map(slice, sizes))] = flat.reshape(*x.shape[:2], *sizes)
    return out


@kernel("AveragePool")
def average_pool(call: Call, x: Array) -> Array:
    """The mean under every window; padding counts only with `count_include_pad`."""
    xp, x = call.xp, wide(call.xp, x)
    windows = _windows(call, x)
    total = windows.fold(padded(xp, x, windows.ends, 0), xp.add)
    for dim, (size, (before, after)) in enumerate(zip(x.shape[2:], windows.pads)):
        if not call.attrs.get("count_include_pad", 0):
            before = after = 0
        at = windows.positions(xp, dim)
        count = xp.sum((at >= -before) & (at < size + after), axis=1).astype(x.dtype)
        total = total / count.reshape(-1, *(1,) * (x.ndim - 3 - dim))
    return rounded(call, total)


@kernel("LpPool")
def lp_pool(call: Call, x: Array) -> Array:
    """(sum of |x|^p)^(1/p) under every window, `p` default 2."""
    xp, x, p = call.xp, wide(call.xp, x), call.attrs.get("p", 2)
    windows = _windows(call, x)
    return rounded(call, windows.fold(padded(xp, xp.abs(x) ** p, windows.ends, 0), xp.add) ** (1 / p))


@kernel("GlobalLpPool")
def global_lp_pool(call: Call, x: Array) -> Array:
    """(sum of |x|^p)^(1/p) over all spatial dims, `p` default 2."""
    xp, x, p = call.xp, wide(call.xp, x), call.attrs.get("p", 2)
    return rounded(call, xp.sum(xp.abs(x) ** p, axis=tuple(range(2, x.ndim)), keepdims=True) ** (1 / p))


@kernel("GlobalAveragePool")
def global_average_pool(call: Call, x: Array) -> Array:
    """The mean over all spatial dims."""
    return rounded(call, wide(call.xp, x).mean(axis=tuple(range(2, x.ndim)), keepdims=True))


@kernel("GlobalMaxPool")
def global_max_pool(call: Call, x: Array) -> Array:
    """The maximum over all spatial dims."""
    return rounded(call, wide(call.xp, x).max(axis=tuple(range(2, x.ndim)), keepdims=True))
