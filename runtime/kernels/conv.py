"""Convolutions over the spatial dims of [n, c, spatial...]: unfolded to columns, then one product a group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel
from onnxmesh.runtime.kernels.sampling import linear, picker
from onnxmesh.runtime.kernels.windows import overlap_add, padded, pads, spatial, windows

_COLUMN_BYTES = 64 << 20
"""The most that a convolution unfolds at once."""


@kernel("Conv")
def conv(call: Call, x: Array, w: Array, b: Array | None = None) -> Array:
    """Convolution of x [n, c, spatial...] with w [m, c/group, taps...]; 1 to 3 spatial dims.

    Attributes strides, dilations, pads, auto_pad and group as in ONNX.
    """
    xp, taps, group = call.xp, w.shape[2:], call.attrs.get("group", 1)
    x = wide(xp, x)
    x = padded(xp, x, pads(call.attrs, x.shape[2:], taps), 0)
    sizes = call.outs[0].shape[2:]
    strides, dilations = (spatial(call.attrs, name, len(taps)) for name in ("strides", "dilations"))
    view = windows(xp, x, taps, strides, dilations, sizes)
    view = _grouped(xp, view, group)
    kernels = wide(xp, w).reshape(group, w.shape[0] // group, -1)
    out = xp.empty((len(x), group, kernels.shape[1], *sizes), x.dtype)
    rows = max(1, _COLUMN_BYTES // max(1, w[0].size * group * prod(sizes[1:]) * x.itemsize))
    for i, start in product(range(len(x)), range(0, sizes[0], rows)):
        at = (slice(None),) * (2 + len(taps)) + (slice(start, start + rows),)
        columns = view[i][at].reshape(group, kernels.shape[2], -1)
        part = xp.matmul(kernels, columns)
        out[i, :, :, start : start + rows] = part.reshape(*part.shape[:2], -1, *sizes[1:])
    out = out.reshape(call.outs[0].shape)
    return rounded(call, out if b is None else out + _per_channel(wide(xp, b), out.ndim))


def _grouped(xp: Any, view: Array, group: int) -> Array:
    """The view [n, c, ...] as [n, group, c/group, ...], without a copy."""
    n, c, *rest = view.shape
    step_n, step_c, *steps = view.strides
    shape, strides = (n, group, c // group, *rest), (step_n, step_c * (c // group), step_c, *steps)
    return xp.lib.stride_tricks.as_strided(view, shape=shape, strides=strides)


def _per_channel(b: Array, ndim: int) -> Array:
    return b.reshape(-1, *[1] * (ndim - 2))


@kernel("ConvTranspose")
def conv_transpose(call: Call, x: Array, w: Array, b: Array | None = None) -> Array:
    """Transposed convolution of x [n, c, spatial...] with w [c, m/group, taps...], attributes as in ONNX."""
    xp, taps, group = call.xp, w.shape[2:], call.attrs.get("group", 1)
    n, sizes, out_sizes = len(x), x.shape[2:], call.outs[0].shape[2:]
    strides, dilations = (spatial(call.attrs, name, len(taps)) for name in ("strides", "dilations"))
    full = [(s - 1) * stride + (t - 1) * d + 1 for s, stride, t, d in zip(sizes, strides, taps, dilations)]
    begins = _transpose_begins(call, full, out_sizes, strides)
    full = [max(f, a + o) for f, a, o in zip(full, begins, out_sizes)]
    kernels = wide(xp, w).reshape(group, w.shape[0] // group, -1).swapaxes(1, 2)
    columns = xp.matmul(kernels, wide(xp, x).reshape(n, group, w.shape[0] // group, -1))
    columns = columns.reshape(n, group * w.shape[1], *taps, *sizes)
    out = overlap_add(xp, columns, strides, dilations, full)
    out = out[(..., *(slice(a, a + size) for a, size in zip(begins, out_sizes)))]
    return rounded(call, out if b is None else out + _per_channel(wide(xp, b), out.ndim))


def _transpose_begins(call: Call, full: Sequence[int], sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """How much is cut off at the begin of every spatial dim of the full result."""
    given, auto = call.attrs.get("pads"), call.attrs.get("auto_pad", "NOTSET")
    if auto == "NOTSET" and not call.attrs.get("output_shape"):
        return list(given[: len(full)]) if given else [0] * len(full)
    extra = call.attrs.get("output_padding") or [0] * len(full)
    totals = [max(0, f + e - size) for f, e, size in zip(full, extra, sizes)]
    return [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in totals]


@kernel("DeformConv")
def deform_conv(
    call: Call, x: Array, w: Array, offset: Array, b: Array | None = None, mask: Array | None = None
) -> Array:
    """Convolution whose taps stand off the grid by `offset`, weighted by `mask`: Zhu et al., Deformable ConvNets v2.

    x [n, c, h, w], w [m, c/group, taps...]; offset [n, offset_group * taps * 2, sizes...] as (y, x), and mask without
    the 2. Channels are read between pixels, zero outside. Attributes as in ONNX.
    """
    xp, attrs, taps, sizes = call.xp, call.attrs, w.shape[2:], call.outs[0].shape[2:]
    n, groups, count, points = len(x), attrs.get("offset_group", 1), prod(taps), prod(sizes)
    strides, dilations = (spatial(attrs, name, len(taps)) for name in ("strides", "dilations"))
    begins = [a for a, _ in pads(attrs, x.shape[2:], taps)]
    offset = wide(xp, offset).reshape(n * groups, count, len(taps), points)
    mask = None if mask is None else wide(xp, mask).reshape(n * groups, count, 1, points)
    pick = picker(xp, wide(xp, x).reshape(n * groups, x.shape[1] // groups, *x.shape[2:]))
    columns = []
    for k, tap in enumerate(product(*map(range, taps))):
        grid = [
            xp.arange(size) * stride + t * dilation - begin
            for size, stride, t, dilation, begin in zip(sizes, strides, tap, dilations, begins)
        ]
        at = [
            (offset[:, k, dim].reshape(-1, *sizes) + xp.expand_dims(line, tuple(range(1, len(sizes) - dim)))).reshape(
                -1, points
            )
            for dim, line in enumerate(grid)
        ]
        column = linear(xp, at, pick)
        columns.append((column if mask is None else column * mask[:, k]).reshape(n, x.shape[1], points))
    group = attrs.get("group", 1)
    unfolded = xp.stack(columns, axis=2).reshape(n, group, -1, points)
    out = xp.matmul(wide(xp, w).reshape(group, w.shape[0] // group, -1), unfolded).reshape(call.outs[0].shape)
    return rounded(call, out if b is None else out + _per_channel(wide(xp, b), out.ndim))


@kernel("Col2Im")
def col2im(call: Call, x: Array) -> Array:
    """Blocks x [n, c * prod(block_shape), positions] added up to the image [n, c, sizes...] that they were cut from."""
    attrs, block, sizes = call.attrs, call.attrs["block_shape"], call.outs[0].shape[2:]
    strides, dilations = (spatial(attrs, name, len(block)) for name in ("strides", "dilations"))
    widths = pads(attrs, sizes, block)
    full = [size + a + b for size, (a, b) in zip(sizes, widths)]
    counts = [(f - d * (k - 1) - 1) // s + 1 for f, d, k, s in zip(full, dilations, block, strides)]
    columns = wide(call.xp, x).reshape(*call.outs[0].shape[:2], *block, *counts)
    out = overlap_add(call.xp, columns, strides, dilations, full)
    return rounded(call, out[(..., *(slice(a, a + size) for (a, _), size in zip(widths, sizes)))])
