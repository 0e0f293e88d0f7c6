"""Reductions along axes, cumulative ones, and selection by size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxmesh.runtime.kernels.numeric import is_float, rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel

Reduction = Callable[..., Array]
"""(xp, x, axis=, keepdims=) -> reduced x."""


def _log_sum_exp(xp: Any, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    highest = x.max(axis=axis, keepdims=True)
    offset = xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest))
    logs = xp.log(xp.exp(x - offset).sum(axis=axis, keepdims=True)) + offset
    return logs if keepdims else xp.squeeze(logs, axis=axis)


REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": lambda xp, x, **k: xp.sum(x, **k),
    "ReduceMean": lambda xp, x, **k: xp.mean(x, **k),
    "ReduceMax": lambda xp, x, **k: xp.max(x, **k),
    "ReduceMin": lambda xp, x, **k: xp.min(x, **k),
    "ReduceProd": lambda xp, x, **k: xp.prod(x, **k),
    "ReduceL1": lambda xp, x, **k: xp.sum(xp.abs(x), **k),
    "ReduceL2": lambda xp, x, **k: xp.sqrt(xp.sum(x * x, **k)),
    "ReduceSumSquare": lambda xp, x, **k: xp.sum(x * x, **k),
    "ReduceLogSum": lambda xp, x, **k: xp.log(xp.sum(x, **k)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _register(op: str, reduction: Reduction) -> None:
    @kernel(op)
    def reduce(call: Call, x: Array) -> Array:
        keepdims = bool(call.attrs.get("keepdims", 1))
        return rounded(call, reduction(call.xp, wide(call.xp, x), axis=axes_of(call, x), keepdims=keepdims))


def axes_of(call: Call, x: Array) -> tuple[int, ...]:
    """The attribute `axes`; absent means all."""
    axes = call.attrs.get("axes")
    return tuple(range(x.ndim)) if axes is None else tuple(axes)


for _op, _reduction in REDUCTIONS.items():
    _register(_op, _reduction)


@kernel("ArgMax")
def arg_max(call: Call, x: Array) -> Array:
    """Index of the greatest entry along `axis` (default 0); `select_last_index` says which of equal ones."""
    return _arg(call, wide(call.xp, x), call.xp.argmax)


@kernel("ArgMin")
def arg_min(call: Call, x: Array) -> Array:
    """Index of the least entry along `axis` (default 0); `select_last_index` says which of equal ones."""
    return _arg(call, wide(call.xp, x), call.xp.argmin)


def _arg(call: Call, x: Array, function: Callable[..., Array]) -> Array:
    axis = call.attrs.get("axis", 0) % x.ndim
    if call.attrs.get("select_last_index", 0):
        index = x.shape[axis] - 1 - function(call.xp.flip(x, axis), axis=axis)
    else:
        index = function(x, axis=axis)
    return rounded(call, index).reshape(call.outs[0].shape)


@kernel("CumSum")
def cum_sum(call: Call, x: Array) -> Array:
    """Running sums along `axis`; `exclusive` leaves the entry itself out, `reverse` starts at the end."""
    return _cumulative(call, x, call.xp.cumsum, 0)


@kernel("CumProd")
def cum_prod(call: Call, x: Array) -> Array:
    """Running products along `axis`; attributes as CumSum."""
    return _cumulative(call, x, call.xp.cumprod, 1)


def _cumulative(call: Call, x: Array, function: Callable[..., Array], identity: int) -> Array:
    xp, x = call.xp, wide(call.xp, x)
    axis = call.attrs["axis"] % x.ndim
    x = xp.flip(x, axis) if call.attrs.get("reverse", 0) else x
    if call.attrs.get("exclusive", 0):
        first = xp.full((*x.shape[:axis], 1, *x.shape[axis + 1 :]), identity, x.dtype)
        x = xp.concatenate([first, x[(slice(None),) * axis + (slice(0, -1),)]], axis=axis)
    result = function(x, axis=axis, dtype=x.dtype)
    return rounded(call, xp.flip(result, axis) if call.attrs.get("reverse", 0) else result)


@kernel("TopK")
def top_k(call: Call, x: Array) -> tuple[Array, Array]:
    """The `k` greatest (or least) entries along `axis` in order, and their indices; equal ones by index."""
    xp, axis = call.xp, call.attrs.get("axis", -1) % x.ndim
    keys = wide(xp, x)
    if call.attrs.get("largest", 1):
        order = xp.flip(x.shape[axis] - 1 - _stable_argsort(xp, xp.flip(keys, axis), axis), axis)
    else:
        order = _stable_argsort(xp, keys, axis)
    order = order[(slice(None),) * axis + (slice(0, call.attrs["k"]),)]
    return xp.take_along_axis(x, order, axis=axis), rounded(call, order, 1)


def _stable_argsort(xp: Any, x: Array, axis: int) -> Array:
    return xp.argsort(x, axis=axis, kind="stable")


@kernel("Hardmax")
def hardmax(call: Call, x: Array) -> Array:
    """1 at the first greatest entry along `axis`, 0 elsewhere."""
    xp, axis = call.xp, call.attrs.get("axis", -1) % x.ndim
    index = xp.argmax(wide(xp, x), axis=axis)
    shape = tuple(-1 if i == axis else 1 for i in range(x.ndim))
    return rounded(call, xp.arange(x.shape[axis]).reshape(shape) == xp.expand_dims(index, axis))


@kernel("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: Array) -> Array:
    """(x - mean) / (standard deviation + 1e-9) over `axes` (default 0, 2, 3)."""
    xp, axes = call.xp, tuple(call.attrs.get("axes", (0, 2, 3)))
    x = wide(xp, x)
    assert is_float(x)
    return rounded(call, (x - x.mean(axis=axes, keepdims=True)) / (x.std(axis=axes, keepdims=True) + 1e-9))
