"""GridSample and AffineGrid: images read where a grid of positions says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel
from onnxmesh.runtime.kernels.sampling import clamped, cubic, linear, picker, reflect

_MODES = {"bilinear": "linear", "bicubic": "cubic"}
"""Names of before opset 20."""


@kernel("GridSample")
def grid_sample(call: Call, x: Array, grid: Array) -> Array:
    """x [n, c, sizes...] read at grid [n, points..., d]: [n, c, points...].

    The last dim of the grid holds a position as (x, y) or (x, y, z), from -1 to 1 over the image: over the centres of
    its border pixels with `align_corners`, else over their outer edges. Modes linear, nearest, cubic.
    """
    xp, attrs, sizes = call.xp, call.attrs, x.shape[2:]
    corners = bool(attrs.get("align_corners", 0))
    mode, padding = attrs.get("mode", "linear"), attrs.get("padding_mode", "zeros")
    mode = _MODES.get(mode, mode)
    places = wide(xp, grid).reshape(len(grid), -1, len(sizes))
    at = [_pixel(places[..., -1 - i], size, corners) for i, size in enumerate(sizes)]
    bounds = _bounds(xp, sizes, padding, corners)
    pick = picker(xp, wide(xp, x), bounds)
    if mode == "nearest":
        y = pick([xp.rint(position).astype(xp.int64) for position in at])
    elif mode == "linear":
        y = linear(xp, _inside(xp, at, sizes, padding, corners), pick)
    elif mode == "cubic":
        y = cubic(xp, at, pick)
    else:
        raise PlanError(f"GridSample: the mode {mode!r} is unknown", code="OM4006")
    return rounded(call, y.reshape(call.outs[0].shape))


def _pixel(place: Array, size: int, corners: bool) -> Array:
    """From -1 .. 1 to positions in pixels."""
    return (place + 1) / 2 * (size - 1) if corners else ((place + 1) * size - 1) / 2


def _edges(size: int, corners: bool) -> tuple[float, float]:
    """Where positions are mirrored."""
    return (0, size - 1) if corners else (-0.5, size - 0.5)


def _bounds(xp: Any, sizes: tuple[int, ...], padding: str, corners: bool) -> list[Callable[[Array], Array]] | None:
    if padding == "zeros":
        return None
    if padding == "border":
        return clamped(xp, sizes)

    def mirrored(size: int, at: Array) -> Array:
        return xp.clip(reflect(xp, at, *_edges(size, corners)).astype(xp.int64), 0, size - 1)

    return [partial(mirrored, size) for size in sizes]


def _inside(xp: Any, at: list[Array], sizes: tuple[int, ...], padding: str, corners: bool) -> list[Array]:
    """Positions before they are interpolated: with a padding of pixels they are brought inside first."""
    if padding == "border":
        return [xp.clip(position, 0, size - 1) for position, size in zip(at, sizes)]
    if padding == "reflection":
        return [reflect(xp, position, *_edges(size, corners)) for position, size in zip(at, sizes)]
    return at


@kernel("AffineGrid")
def affine_grid(call: Call, theta: Array) -> Array:
    """The grid [n, points..., d] for GridSample: theta [n, d, d + 1] times (x, y[, z], 1) of every point."""
    xp, wider = call.xp, wide(call.xp, theta)
    sizes = call.outs[0].shape[1:-1]
    points = [_points(xp, size, bool(call.attrs.get("align_corners", 0))) for size in sizes]
    axes = [
        xp.broadcast_to(p.reshape(-1, *(1,) * (len(sizes) - 1 - i)), sizes).reshape(-1) for i, p in enumerate(points)
    ]
    base = xp.stack([*reversed(axes), xp.ones(prod(sizes))], axis=-1).astype(wider.dtype)
    return rounded(call, xp.matmul(base, wider.swapaxes(1, 2)).reshape(call.outs[0].shape))


def _points(xp: Any, size: int, corners: bool) -> Array:
    """-1 to 1 in `size` steps: the ends included, or the middles of `size` equal parts; one point is the middle."""
    if corners and size > 1:
        return xp.arange(size) * (2 / (size - 1)) - 1
    return (xp.arange(size) * 2 + 1) / size - 1
