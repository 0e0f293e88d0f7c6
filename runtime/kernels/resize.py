"""Resize: interpolation of every axis in turn, by gathering (nearest) or by a matrix (linear, cubic)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("Resize")
def resize(
    call: Call, x: Array, roi: Array | None = None, scales: Array | None = None, sizes: Array | None = None
) -> Array:
    """x interpolated to the shape of the output; attributes as in ONNX, without crops and antialiasing."""
    attrs, out = call.attrs, call.outs[0].shape
    mode = attrs.get("mode", "nearest")
    if attrs.get("antialias", 0) or attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise PlanError("Resize: antialiasing and tf_crop_and_resize are not supported")
    factors = _factors(x, out, attrs, scales)
    y = x if mode == "nearest" else wide(call.xp, x)
    for axis, (size, target, factor) in enumerate(zip(x.shape, out, factors)):
        if size == target and factor == 1:
            continue
        at = _coordinates(call.xp, size, target, factor, attrs)
        if mode == "nearest":
            y = call.xp.take(y, _nearest(call.xp, at, size, attrs), axis=axis)
        else:
            weights = _linear(call.xp, at, size) if mode == "linear" else _cubic(call.xp, at, size, attrs)
            y = call.xp.moveaxis(call.xp.moveaxis(y, axis, -1) @ weights.astype(y.dtype).T, -1, axis)
    return rounded(call, y)


def _factors(x: Array, out: tuple[int, ...], attrs: Mapping[str, Any], scales: Array | None) -> list[float]:
    """The scale of every axis: as given, or target by source size."""
    if scales is None or scales.size == 0:
        return [o / n for o, n in zip(out, x.shape)]
    given = dict(zip(attrs.get("axes") or range(x.ndim), scales.tolist()))
    return [given.get(axis, 1.0) for axis in range(x.ndim)]


def _coordinates(xp: Any, size: int, target: int, factor: float, attrs: Mapping[str, Any]) -> Array:
    """Where every entry of the result lies in the source."""
    i, mode = xp.arange(target, dtype=xp.float64), attrs.get("coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return i / factor
    if mode == "align_corners":
        return i * ((size - 1) / (target - 1)) if target > 1 else i * 0
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


def _linear(xp: Any, at: Array, size: int) -> Array:
    """[target, size]: the weights of the two neighbours; beyond the ends the last entry holds."""
    distance = xp.abs(xp.clip(at, 0, size - 1)[:, None] - xp.arange(size))
    return xp.maximum(1 - distance, 0)


def _cubic(xp: Any, at: Array, size: int, attrs: Mapping[str, Any]) -> Array:
    """[target, size]: Keys' cubic convolution (1981) over four neighbours, `cubic_coeff_a` default -0.75."""
    a, first = attrs.get("cubic_coeff_a", -0.75), xp.floor(at)
    weights = xp.zeros((at.size, size))
    for offset in (-1, 0, 1, 2):
        position = first + offset
        d = xp.abs(at - position)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weight = xp.where(d <= 1, near, xp.where(d < 2, far, 0))
        if attrs.get("exclude_outside", 0):
            weight = xp.where((position >= 0) & (position < size), weight, 0)
        column = xp.clip(position, 0, size - 1)[:, None] == xp.arange(size)
        weights += xp.where(column, weight[:, None], 0)
    total = weights.sum(axis=1, keepdims=True)
    return weights / total if attrs.get("exclude_outside", 0) else weights
