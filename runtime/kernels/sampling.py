"""Reading images between their pixels: shared by GridSample, RoiAlign and DeformConv."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

from onnxmesh.runtime.kernels.registry import Array

Pick = Callable[[Sequence[Array]], Array]
"""From integer positions, one [b, p] a spatial dim, to the pixels there [b, c, p]."""


def picker(
    xp: Any, x: Array, bounds: Sequence[Callable[[Array], Array]] | None = None, image: Array | None = None
) -> Pick:
    """Reads pixels of x [n, c, sizes...]: row b of the positions reads image b, or `image[b]` (int64 [b]).

    `bounds` brings the positions of every dim into it; without, there are zeros outside.
    """
    sizes, planes = x.shape[2:], x.reshape(*x.shape[:2], -1)
    image = xp.arange(len(x)) if image is None else image

    def pick(at: Sequence[Array]) -> Array:
        flat, inside = 0, True
        for i, (position, size) in enumerate(zip(at, sizes)):
            if bounds is None:
                inside = inside & (position >= 0) & (position < size)
                position = xp.clip(position, 0, size - 1)
            else:
                position = bounds[i](position)
            flat = flat * size + position
        values = planes[image[:, None], :, flat].swapaxes(1, 2)
        return values if bounds is not None else xp.where(inside[:, None], values, xp.zeros((), x.dtype))  # type: ignore[index]

    return pick


def clamped(xp: Any, sizes: Sequence[int]) -> list[Callable[[Array], Array]]:
    """Bounds by which the border repeats without end."""
    return [partial(xp.clip, a_min=0, a_max=size - 1) for size in sizes]


def reflect(xp: Any, at: Array, low: float, high: float) -> Array:
    """Positions mirrored at `low` and `high` until they lie between."""
    span = high - low
    if span <= 0:
        return xp.full_like(at, low)
    offset = xp.mod(at - low, 2 * span)
    return xp.minimum(offset, 2 * span - offset) + low


def corners(xp: Any, at: Sequence[Array]) -> Iterator[tuple[list[Array], Array]]:
    """The pixels around positions [b, p], one array a dim, and their weights [b, p] in linear interpolation."""
    return _around(xp, at, (0, 1), lambda fraction: (1 - fraction, fraction))


def linear(xp: Any, at: Sequence[Array], pick: Pick) -> Array:
    """Linear interpolation at positions [b, p], one array a dim: [b, c, p]."""
    return sum(pick(pixel) * weight[:, None] for pixel, weight in corners(xp, at))


def cubic(xp: Any, at: Sequence[Array], pick: Pick, a: float = -0.75) -> Array:
    """Cubic interpolation with Keys' kernel at positions [b, p], one array a dim: [b, c, p]."""
    offsets = (-1, 0, 1, 2)
    around = _around(xp, at, offsets, lambda fraction: [keys(xp, xp.abs(fraction - k), a) for k in offsets])
    return sum(pick(pixel) * weight[:, None] for pixel, weight in around)


def _around(
    xp: Any, at: Sequence[Array], offsets: Sequence[int], weights: Callable[[Array], Sequence[Array]]
) -> Iterator[tuple[list[Array], Array]]:
    """Pixels at `offsets` from the pixel before every position, with the product of the weights of all dims."""
    floors = [xp.floor(position) for position in at]
    first = [floor.astype(xp.int64) for floor in floors]
    each = [weights(position - floor) for position, floor in zip(at, floors)]
    for corner in product(range(len(offsets)), repeat=len(at)):
        weight: Any = 1
        for dim, k in enumerate(corner):
            weight = weight * each[dim][k]
        yield [f + offsets[k] for f, k in zip(first, corner)], weight


def keys(xp: Any, distance: Array, a: float) -> Array:
    """Keys' cubic convolution kernel (1981) at a distance >= 0, with parameter `a`."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return xp.where(distance <= 1, near, xp.where(distance < 2, far, xp.zeros_like(distance)))
