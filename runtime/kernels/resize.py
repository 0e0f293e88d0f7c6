"""Resize: every axis in turn, by gathering (nearest) or as a weighted sum of neighbours (linear, cubic)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from onnxmesh.runtime.kernels.numeric import is_float, rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel
from onnxmesh.runtime.kernels.sampling import keys

_CROP = "tf_crop_and_resize"


@kernel("Resize")
def resize(call: Call, x: Array, roi: Array | None = None) -> Array:
    """x interpolated to the shape of the output; attributes as in ONNX, but for these.

    `scales` has the factor of every dim (absent: target by source size). `axes` are the dims that `roi` crops: starts,
    then ends, as parts of the image; it is there only with tf_crop_and_resize.
    """
    xp, attrs, out = call.xp, call.attrs, call.outs[0].shape
    nearest = attrs.get("mode", "nearest") == "nearest"
    y = x if nearest else wide(xp, x)
    y = y if nearest or is_float(y) else y.astype(xp.float32)
    factors = attrs.get("scales") or [o / n for o, n in zip(out, x.shape)]
    crops = _crops(attrs, roi, x.ndim)
    outside: Any = False
    for axis, (size, target, factor) in enumerate(zip(x.shape, out, factors)):
        if size == target and factor == 1 and axis not in crops:
            continue
        at = _coordinates(xp, size, target, factor, attrs, crops.get(axis))
        if nearest:
            y = xp.take(y, _nearest(xp, at, size, attrs), axis=axis)
        else:
            y = _interpolated(xp, y, axis, at, factor, attrs)
        if axis in crops:
            outside = outside | _along((at < 0) | (at > size - 1), axis, x.ndim)
    if crops:
        y = xp.where(outside, xp.asarray(attrs.get("extrapolation_value", 0.0), dtype=y.dtype), y)
    return rounded(call, y)


def _crops(attrs: Mapping[str, Any], roi: Array | None, rank: int) -> dict[int, tuple[Array, Array]]:
    """Start and end by axis, each an array of one number."""
    if roi is None or attrs.get("coordinate_transformation_mode") != _CROP:
        return {}
    axes = attrs.get("axes") or range(rank)
    return {axis: (roi[k], roi[k + len(axes)]) for k, axis in enumerate(axes)}


def _along(values: Array, axis: int, rank: int) -> Array:
    """A vector as an array of `rank` dims that varies along `axis`."""
    return values.reshape(*(-1 if i == axis else 1 for i in range(rank)))


def _coordinates(
    xp: Any, size: int, target: int, factor: float, attrs: Mapping[str, Any], crop: tuple[Array, Array] | None
) -> Array:
    """Where every entry of the result lies in the source."""
    i, mode = xp.arange(target, dtype=xp.float64), attrs.get("coordinate_transformation_mode", "half_pixel")
    if crop is not None:
        start, end = (edge.astype(xp.float64) * (size - 1) for edge in crop)
        return start + i * ((end - start) / (target - 1)) if target > 1 else i + (start + end) / 2
    if mode == "asymmetric":
        return i / factor
    if mode == "align_corners":
        length = factor * size
        return i * ((size - 1) / (length - 1)) if length != 1 else i * 0
    if mode == "pytorch_half_pixel" and target <= 1:
        return i * 0
    if mode == "half_pixel_symmetric":
        centre = size / 2 * (1 - target / (factor * size))
        return centre + (i + 0.5) / factor - 0.5
    return (i + 0.5) / factor - 0.5


def _nearest(xp: Any, at: Array, size: int, attrs: Mapping[str, Any]) -> Array:
    mode = attrs.get("nearest_mode", "round_prefer_floor")
    rounds = {
        "round_prefer_floor": lambda: xp.ceil(at - 0.5),
        "round_prefer_ceil": lambda: xp.floor(at + 0.5),
        "floor": lambda: xp.floor(at),
        "ceil": lambda: xp.ceil(at),
    }
    return xp.clip(rounds[mode](), 0, size - 1).astype(xp.int64)


def _interpolated(xp: Any, y: Array, axis: int, at: Array, factor: float, attrs: Mapping[str, Any]) -> Array:
    """y at positions `at` of an axis; beyond the ends the last entry holds, or counts nothing (`exclude_outside`)."""
    size, total, weights = y.shape[axis], 0.0, 0.0
    outside, shrink = attrs.get("exclude_outside", 0), min(factor, 1.0) if attrs.get("antialias", 0) else 1.0
    normalised = outside or shrink < 1
    for position, weight in _neighbours(xp, at, shrink, attrs):
        if outside:
            weight = xp.where((position >= 0) & (position < size), weight, 0.0)
        index = xp.clip(position, 0, size - 1).astype(xp.int64)
        total = total + xp.take(y, index, axis=axis) * _along(weight, axis, y.ndim).astype(y.dtype)
        weights = weights + weight
    return total / _along(weights, axis, y.ndim).astype(y.dtype) if normalised else total


def _neighbours(xp: Any, at: Array, shrink: float, attrs: Mapping[str, Any]) -> Iterator[tuple[Array, Array]]:
    """The positions around `at` and their weights; antialiasing widens the kernel as the image shrinks."""
    cubic = attrs["mode"] == "cubic"
    reach, first = (2 if cubic else 1) / shrink, xp.floor(at)
    for offset in range(math.floor(-reach) + 1, math.ceil(reach) + 1):
        distance = xp.abs(at - (first + offset)) * shrink
        weight = keys(xp, distance, attrs.get("cubic_coeff_a", -0.75)) if cubic else xp.maximum(1 - distance, 0.0)
        yield first + offset, weight
