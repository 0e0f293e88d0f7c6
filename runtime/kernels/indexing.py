"""Ops that read or write at positions given by an index tensor. Negative indices count from the end."""

from __future__ import annotations

from typing import Any

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("Gather")
def gather(call: Call, data: Array, indices: Array) -> Array:
    """data with dim `axis` (default 0) replaced by the dims of indices."""
    return call.xp.take(data, indices, axis=call.attrs.get("axis", 0))


@kernel("GatherElements")
def gather_elements(call: Call, data: Array, indices: Array) -> Array:
    """out[i, j, k] = data[indices[i, j, k], j, k], for `axis` 0 (the default)."""
    axis = call.attrs.get("axis", 0) % data.ndim
    extent = tuple(slice(None) if i == axis else slice(0, n) for i, n in enumerate(indices.shape))
    return call.xp.take_along_axis(data[extent], indices.astype(call.xp.int64), axis=axis)


@kernel("GatherND")
def gather_nd(call: Call, data: Array, indices: Array) -> Array:
    """out[b, i] = data[b][indices[b, i]], where b are `batch_dims` dims and the last dim of indices a tuple."""
    batch = call.attrs.get("batch_dims", 0)
    return data[(*_grid(call.xp, indices.shape[:batch], indices.ndim - 1), *_columns(call.xp, indices))]


@kernel("ScatterND")
def scatter_nd(call: Call, data: Array, indices: Array, updates: Array) -> Array:
    """data with `updates[i]` put at (`reduction`: added to, ...) data[indices[i]]."""
    return _scatter(call, data, _columns(call.xp, indices), updates)


@kernel("ScatterElements")
def scatter_elements(call: Call, data: Array, indices: Array, updates: Array) -> Array:
    """data with updates[i, j] put at (`reduction`: added to, ...) data[indices[i, j], j], for `axis` 0."""
    xp, axis = call.xp, call.attrs.get("axis", 0) % data.ndim
    index = list(_grid(xp, indices.shape, indices.ndim))
    index[axis] = indices
    return _scatter(call, data, tuple(index), updates)


def _scatter(call: Call, data: Array, index: tuple[Array, ...], updates: Array) -> Array:
    xp, reduction = call.xp, call.attrs.get("reduction", "none")
    if reduction == "none":
        result = data.copy()
        result[index] = updates
        return result
    function = {"add": xp.add, "mul": xp.multiply, "max": xp.maximum, "min": xp.minimum}[reduction]
    result = xp.array(wide(xp, data))
    function.at(result, index, wide(xp, updates))
    return rounded(call, result)


def _columns(xp: Any, indices: Array) -> tuple[Array, ...]:
    """The last dim of `indices` taken apart, as NumPy's advanced indexing wants it."""
    return tuple(indices[..., i] for i in range(indices.shape[-1]))


def _grid(xp: Any, shape: tuple[int, ...], ndim: int) -> tuple[Array, ...]:
    """For each dim of `shape` its positions, shaped to broadcast with `ndim` dims."""
    return tuple(xp.arange(n).reshape(-1, *[1] * (ndim - 1 - i)) for i, n in enumerate(shape))


@kernel("OneHot")
def one_hot(call: Call, indices: Array, depth: Array, values: Array) -> Array:
    """values[1] where the position along `axis` (default -1) equals the index, values[0] elsewhere."""
    xp, axis = call.xp, call.attrs.get("axis", -1) % (indices.ndim + 1)
    size = call.outs[0].shape[axis]
    positions = xp.arange(size).reshape(-1, *[1] * (indices.ndim - axis))
    wrapped = xp.where(indices < 0, indices + size, indices)
    chosen = positions == xp.expand_dims(wrapped, axis)
    return xp.where(chosen, values[1], values[0]).astype(values.dtype, copy=False)  # CuPy widens bfloat16


@kernel("Compress")
def compress(call: Call, x: Array, condition: Array) -> Array:
    """The slices of x along `axis` (of flat x without one) where `condition` holds."""
    return call.xp.compress(condition, x, axis=call.attrs.get("axis"))


@kernel("ReverseSequence")
def reverse_sequence(call: Call, x: Array, lengths: Array) -> Array:
    """The first lengths[b] entries along `time_axis` reversed, for every b of `batch_axis`."""
    xp, time, batch = call.xp, call.attrs.get("time_axis", 0), call.attrs.get("batch_axis", 1)
    steps, ends = xp.arange(x.shape[time]), lengths
    steps = steps[:, None] if time < batch else steps[None, :]
    ends = ends[None, :] if time < batch else ends[:, None]
    order = xp.where(steps < ends, ends - 1 - steps, steps)
    return xp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=time)
