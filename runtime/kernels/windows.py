"""Sliding windows over the spatial dims, shared by convolutions, pooling and Col2Im."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from onnxmesh.runtime.kernels.registry import Array


def spatial(attrs: Mapping[str, Any], name: str, dims: int) -> list[int]:
    """The attribute `name` (strides, dilations): one int a spatial dim, 1 where it is absent."""
    return list(attrs.get(name) or [1] * dims)


def pads(attrs: Mapping[str, Any], sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) padding per spatial dim, from `pads` or `auto_pad` (SAME_UPPER, SAME_LOWER, VALID)."""
    auto, given, dims = attrs.get("auto_pad", "NOTSET"), attrs.get("pads"), len(sizes)
    if auto in ("NOTSET", "VALID"):
        given = given if given and auto == "NOTSET" else [0] * (2 * dims)
        return [(given[i], given[i + dims]) for i in range(dims)]
    strides, dilations = spatial(attrs, "strides", dims), spatial(attrs, "dilations", dims)
    result = []
    for size, stride, dilation, taps in zip(sizes, strides, dilations, kernel):
        total = max(0, (-(-size // stride) - 1) * stride + dilation * (taps - 1) + 1 - size)
        small = total // 2
        result.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
    return result


def padded(xp: Any, x: Array, widths: Sequence[tuple[int, int]], value: float) -> Array:
    """x [n, c, spatial...] with its spatial dims padded by `widths` with `value`."""
    if not any(a or b for a, b in widths):
        return x
    shape = [*x.shape[:2], *(n + a + b for n, (a, b) in zip(x.shape[2:], widths))]
    result = xp.full(shape, value, x.dtype)
    result[(..., *(slice(a, a + n) for (a, _), n in zip(widths, x.shape[2:])))] = x
    return result


def windows(
    xp: Any, x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], sizes: Sequence[int]
) -> Array:
    """A read-only view [n, c, taps..., sizes...] of x [n, c, spatial...]: the entry under every tap."""
    steps = x.strides[2:]
    return xp.lib.stride_tricks.as_strided(
        x,
        shape=(*x.shape[:2], *kernel, *sizes),
        strides=(*x.strides[:2], *(s * d for s, d in zip(steps, dilations)), *(s * d for s, d in zip(steps, strides))),
    )


def tap_of(x: Array, axis: int, tap: int, stride: int, dilation: int, size: int) -> Array:
    """What stands under one tap of every window along `axis`: a view of x with `size` entries there."""
    start = tap * dilation
    return x[(slice(None),) * axis + (slice(start, start + (size - 1) * stride + 1, stride),)]


def overlap_add(
    xp: Any, columns: Array, strides: Sequence[int], dilations: Sequence[int], full: Sequence[int]
) -> Array:
    """The sum of overlapping windows [n, c, full...] from columns [n, c, taps..., sizes...], tap by tap."""
    dims = len(full)
    taps, sizes = columns.shape[2 : 2 + dims], columns.shape[2 + dims :]
    out = xp.zeros((*columns.shape[:2], *full), columns.dtype)
    for tap in product(*map(range, taps)):
        spans = zip(tap, strides, dilations, sizes)
        at = tuple(slice(t * d, t * d + (size - 1) * step + 1, step) for t, step, d, size in spans)
        out[(..., *at)] += columns[(slice(None), slice(None), *tap)]
    return out
