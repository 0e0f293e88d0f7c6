"""Normalisations and softmax. Statistics are float32 (float64 for float64 inputs)."""

from __future__ import annotations

from typing import Any

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("LayerNormalization")
def layer_normalization(
    call: Call, x: Array, scale: Array | None = None, bias: Array | None = None
) -> tuple[Array, ...]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the dims from `axis` on; also Mean, InvStdDev."""
    xp, axes = call.xp, tuple(range(call.attrs.get("axis", -1) % x.ndim, x.ndim))
    centred, mean, inverse = _standardise(xp, wide(xp, x), axes, call.attrs.get("epsilon", 1e-5))
    centred *= inverse
    values = (_affine(xp, centred, scale, bias), mean, inverse)
    return tuple(rounded(call, value, i) for i, value in enumerate(values[: len(call.outs)]))


@kernel("RMSNormalization")
def rms_normalization(call: Call, x: Array, scale: Array | None = None) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the dims from `axis` on."""
    xp, axes = call.xp, tuple(range(call.attrs.get("axis", -1) % x.ndim, x.ndim))
    x = wide(xp, x)
    power = xp.mean(x * x, axis=axes, keepdims=True)
    return rounded(call, _affine(xp, x / xp.sqrt(power + call.attrs.get("epsilon", 1e-5)), scale))


@kernel("Softmax")
def softmax(call: Call, x: Array) -> Array:
    """exp(x) / sum(exp(x)) along `axis` (default -1)."""
    xp, axis, x = call.xp, call.attrs.get("axis", -1), wide(call.xp, x)
    powers = xp.exp(x - x.max(axis=axis, keepdims=True))
    powers /= powers.sum(axis=axis, keepdims=True)
    return rounded(call, powers)


@kernel("LogSoftmax")
def log_softmax(call: Call, x: Array) -> Array:
    """x - log(sum(exp(x))) along `axis` (default -1)."""
    xp, axis, x = call.xp, call.attrs.get("axis", -1), wide(call.xp, x)
    x = x - x.max(axis=axis, keepdims=True)
    return rounded(call, x - xp.log(xp.exp(x).sum(axis=axis, keepdims=True)))


@kernel("GroupNormalization")
def group_normalization(call: Call, x: Array, scale: Array, bias: Array) -> Array:
    """x [n, c, ...] standardised within `num_groups` groups of channels; scale and bias [c], or one entry a group."""
    xp, wider = call.xp, wide(call.xp, x)
    grouped = wider.reshape(x.shape[0], call.attrs["num_groups"], -1)
    centred, _, inverse = _standardise(xp, grouped, (-1,), call.attrs.get("epsilon", 1e-5))
    if scale.size != x.shape[1]:
        scale, bias = (xp.repeat(v, x.shape[1] // v.size) for v in (scale, bias))
    return rounded(call, _per_channel(xp, (centred * inverse).reshape(x.shape), scale, bias))


@kernel("InstanceNormalization")
def instance_normalization(call: Call, x: Array, scale: Array, bias: Array) -> Array:
    """x [n, c, ...] standardised within every channel of every sample; scale and bias [c]."""
    xp, axes = call.xp, tuple(range(2, x.ndim))
    centred, _, inverse = _standardise(xp, wide(xp, x), axes, call.attrs.get("epsilon", 1e-5))
    return rounded(call, _per_channel(xp, centred * inverse, scale, bias))


@kernel("BatchNormalization")
def batch_normalization(call: Call, x: Array, scale: Array, bias: Array, mean: Array, var: Array) -> Any:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, all of them [c], on x [n, c, ...].

    In `training_mode` mean and variance are x's own, and two more outputs are the running ones, which keep `momentum`
    (default 0.9) of what they were.
    """
    xp, wider, running = call.xp, wide(call.xp, x), [wide(call.xp, mean), wide(call.xp, var)]
    statistics = running
    if call.attrs.get("training_mode", 0):
        axes, keep = (0, *range(2, x.ndim)), call.attrs.get("momentum", 0.9)
        statistics = [wider.mean(axis=axes), wider.var(axis=axes)]
        running = [keep * old + (1 - keep) * new for old, new in zip(running, statistics)]
    factor = wide(xp, scale) / xp.sqrt(statistics[1] + call.attrs.get("epsilon", 1e-5))
    y = rounded(call, _per_channel(xp, wider, factor, wide(xp, bias) - statistics[0] * factor))
    if len(call.outs) == 1:
        return y
    return (y, *(rounded(call, value, i + 1) for i, value in enumerate(running[: len(call.outs) - 1])))


@kernel("LpNormalization")
def lp_normalization(call: Call, x: Array) -> Array:
    """x over its norm of order `p` (1 or 2, default 2) along `axis`; zero vectors stay zero."""
    xp, axis, x = call.xp, call.attrs.get("axis", -1), wide(call.xp, x)
    if call.attrs.get("p", 2) == 1:
        norm = xp.abs(x).sum(axis=axis, keepdims=True)
    else:
        norm = xp.sqrt((x * x).sum(axis=axis, keepdims=True))
    return rounded(call, x / xp.where(norm == 0, xp.ones_like(norm), norm))


@kernel("LRN")
def local_response_normalization(call: Call, x: Array) -> Array:
    """x / (bias + alpha / size * sum of x^2 over `size` neighbouring channels) ^ beta, on x [n, c, ...]."""
    xp, attrs, wider = call.xp, call.attrs, wide(call.xp, x)
    size = attrs["size"]
    before, channels = (size - 1) // 2, x.shape[1]
    edges = [(0, 0)] * x.ndim
    edges[1] = (before, size - 1 - before)
    squares = xp.pad(wider * wider, edges)
    total = sum(squares[:, i : i + channels] for i in range(size))
    scale = attrs.get("bias", 1.0) + attrs.get("alpha", 1e-4) / size * total
    return rounded(call, wider / scale ** attrs.get("beta", 0.75))


def _standardise(xp: Any, x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array, Array]:
    """(x - mean, mean, 1 / sqrt(var + epsilon)) over `axes`."""
    mean = x.mean(axis=axes, keepdims=True)
    centred = x - mean
    variance = xp.mean(centred * centred, axis=axes, keepdims=True)
    return centred, mean, 1 / xp.sqrt(variance + epsilon)


def _affine(xp: Any, x: Array, scale: Array | None, bias: Array | None = None) -> Array:
    x = x if scale is None else x * wide(xp, scale)
    return x if bias is None else x + wide(xp, bias)


def _per_channel(xp: Any, x: Array, scale: Array, bias: Array) -> Array:
    shape = (-1, *[1] * (x.ndim - 2))
    return x * wide(xp, scale).reshape(shape) + wide(xp, bias).reshape(shape)
