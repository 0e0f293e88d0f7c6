"""Pooling of regions of interest: RoiAlign and MaxRoiPool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel
from onnxmesh.runtime.kernels.sampling import clamped, corners, picker


@dataclass(frozen=True)
class _Samples:
    """The points where the bins of regions are read, a list with one entry a dim (y, x).

    Attributes:
        starts: [r], where the regions begin.
        steps: [r], the size of a bin.
        counts: [r], how many samples a bin has.
        most: the largest count.
        bins: how many bins.
    """

    starts: list[Array]
    steps: list[Array]
    counts: list[Array]
    most: list[int]
    bins: Sequence[int]

    def points(self, xp: Any) -> Iterator[tuple[list[Array], Array]]:
        """Every sample of a bin in turn: its position [r, bins] a dim, and which regions have it [r]."""
        for sample in product(*map(range, self.most)):
            at = []
            for i, k in enumerate(sample):
                inner = ((k + 0.5) / xp.maximum(self.counts[i], 1))[:, None]
                place = self.starts[i][:, None] + (xp.arange(self.bins[i]) + inner) * self.steps[i][:, None]
                place = place[:, :, None] if i == 0 else place[:, None, :]
                at.append(xp.broadcast_to(place, (len(place), *self.bins)).reshape(len(place), -1))
            yield at, (sample[0] < self.counts[0]) & (sample[1] < self.counts[1])


@kernel("RoiAlign")
def roi_align(call: Call, x: Array, rois: Array, image: Array) -> Array:
    """x [n, c, h, w] pooled over rois [r, 4] (x1, y1, x2, y2) of images `image` [r]: [r, c, output height, width].

    Every bin holds `sampling_ratio` samples a dim (0: as many as it has pixels, rounded up), each read between four
    pixels; `mode` avg takes the mean of the samples, max the largest weighted pixel. He et al., Mask R-CNN (2017).
    """
    xp, largest = call.xp, call.attrs.get("mode", "avg") == "max"
    x = wide(xp, x)
    samples = _samples(call, wide(xp, rois))
    sizes = x.shape[2:]
    pick = picker(xp, x, clamped(xp, sizes), image.astype(xp.int64))
    total = xp.full((len(rois), x.shape[1], math.prod(samples.bins)), -math.inf if largest else 0, x.dtype)
    for at, has in samples.points(xp):
        inside = True
        for position, size in zip(at, sizes):
            inside = inside & (position >= -1) & (position <= size)
        at = [xp.clip(position, 0, size - 1) for position, size in zip(at, sizes)]
        for pixel, weight in corners(xp, at):
            value = pick(pixel) * (weight * inside)[:, None].astype(x.dtype)
            if largest:
                total = xp.where(has[:, None, None], xp.maximum(total, value), total)
            else:
                total = total + value * has[:, None, None]
    counts = xp.maximum(samples.counts[0] * samples.counts[1], 1)[:, None, None]
    total = xp.where(xp.isinf(total), 0, total) if largest else total / counts
    return rounded(call, total.reshape(call.outs[0].shape))


def _samples(call: Call, rois: Array) -> _Samples:
    xp, bins = call.xp, call.outs[0].shape[2:]
    half = call.attrs.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    rois = rois * call.attrs.get("spatial_scale", 1.0) - 0.5 * half
    starts = [rois[:, 1], rois[:, 0]]
    sizes = [rois[:, 3] - rois[:, 1], rois[:, 2] - rois[:, 0]]
    steps = [(size if half else xp.maximum(size, 1.0)) / count for size, count in zip(sizes, bins)]
    ratio = call.attrs.get("sampling_ratio", 0)
    if ratio > 0:
        return _Samples(starts, steps, [xp.full(len(rois), ratio)] * 2, [ratio] * 2, bins)
    counts = [xp.maximum(xp.ceil(step), 0).astype(xp.int64) for step in steps]
    return _Samples(starts, steps, counts, [int(count.max()) if len(rois) else 0 for count in counts], bins)


@kernel("MaxRoiPool")
def max_roi_pool(call: Call, x: Array, rois: Array) -> Array:
    """The maximum of x [n, c, h, w] in every bin of rois [r, 5] (image, x1, y1, x2, y2): [r, c, *pooled_shape].

    Corners are rounded to pixels, both inside; bins may share pixels; empty ones are 0. Girshick, Fast R-CNN (2015).
    """
    xp, bins = call.xp, call.attrs["pooled_shape"]
    x, rois = wide(xp, x), wide(xp, rois)
    corner = xp.floor(rois[:, 1:] * call.attrs.get("spatial_scale", 1.0) + 0.5).astype(xp.int64)
    y = x[rois[:, 0].astype(xp.int64)]
    for axis, first in ((3, 0), (2, 1)):
        inside = _bins(xp, corner[:, first], corner[:, first + 2], bins[axis - 2], x.shape[axis])
        inside = xp.expand_dims(inside, (2, 3) if axis == 3 else (2, 4))  # [r, bins, 1, h, w], one of them 1
        columns = [xp.where(inside[:, k], y, -math.inf).max(axis=axis) for k in range(bins[axis - 2])]
        y = xp.stack(columns, axis=axis)
    return rounded(call, xp.where(xp.isinf(y), 0, y))


def _bins(xp: Any, start: Array, end: Array, bins: int, size: int) -> Array:
    """Which pixels of a dim are in every bin of the regions from `start` to `end`: [r, bins, size]."""
    step = xp.maximum(end - start + 1, 1)[:, None] / bins
    low = xp.floor(xp.arange(bins) * step).astype(xp.int64) + start[:, None]
    high = xp.ceil((xp.arange(bins) + 1) * step).astype(xp.int64) + start[:, None]
    at = xp.arange(size)
    return (at >= xp.clip(low, 0, size)[..., None]) & (at < xp.clip(high, 0, size)[..., None])
