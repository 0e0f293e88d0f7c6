"""Ops on tensors as large as the data decide, in ONNX's own form: the inputs and attributes of the model's node.

Kernels that never ask for the shape of an output serve such tensors as they are, where the normal form is ONNX's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxmesh.runtime.kernels import cast, indexing, matmul, norms, views  # noqa: F401  (what they register is looked up)
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE
from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.reduce import REDUCTIONS
from onnxmesh.runtime.kernels.registry import Array, Call, TensorType, find, loose

_SAME_FORM = """
    Compress Concat Einsum Gather GatherElements GatherND LayerNormalization LogSoftmax MatMul RMSNormalization
    ScatterElements ScatterND Softmax Transpose
""".split()

for _op in sorted({*_SAME_FORM, *ELEMENTWISE} - {"Pow"}):
    loose(_op)(find(_op))


@loose("NonZero")
def non_zero(call: Call, x: Array) -> Array:
    """The indices of the elements that are not zero, int64[rank, count]."""
    xp = call.xp
    if x.ndim == 0:
        return xp.zeros((0, int(bool(x))), xp.int64)
    return xp.stack(xp.nonzero(x)).astype(xp.int64)


@loose("Unique")
def unique(call: Call, x: Array) -> tuple[Array, ...]:
    """The different slices along `axis` (elements without one), where each is first, which each is, how many there are.

    Sorted, or with `sorted` 0 in the order in which they come first.
    """
    xp, axis = call.xp, call.attrs.get("axis")
    found, first, which, counts = xp.unique(wide(xp, x), True, True, True, axis=axis)
    which = which.reshape(-1)
    if not call.attrs.get("sorted", 1):
        order = xp.argsort(first)
        found, first, counts = xp.take(found, order, axis=axis or 0), first[order], counts[order]
        which = xp.argsort(order)[which]
    indices = (each.astype(xp.int64) for each in (first, which, counts))
    return (found.astype(x.dtype), *indices)[: len(call.outs)]


@loose("Shape")
def shape(call: Call, x: Array) -> Array:
    """The dims of x from `start` to `end`, int64."""
    dims = list(x.shape)[call.attrs.get("start", 0) : call.attrs.get("end")]
    return call.xp.array(dims, call.xp.int64)


@loose("Size")
def size(call: Call, x: Array) -> Array:
    """How many elements x has, int64."""
    return call.xp.array(x.size, call.xp.int64)


@loose("Identity")
def identity(call: Call, x: Any) -> Any:
    """x, whatever it is."""
    return x


@loose("Constant")
def strings(call: Call) -> Array:
    """A tensor of strings: those of `strings`, in the shape `dims`."""
    return np.array(call.attrs["strings"], dtype=object).reshape(call.attrs["dims"])


# --- shapes that are data -----------------------------------------------------------------------------------


@loose("Reshape")
def reshape(call: Call, x: Array, shape: Array) -> Array:
    """x in another shape; 0 keeps a dim (without `allowzero`), -1 is what is left."""
    keeps = not call.attrs.get("allowzero", 0)
    return x.reshape([x.shape[i] if size == 0 and keeps else size for i, size in enumerate(_ints(shape))])


@loose("Flatten")
def flatten(call: Call, x: Array) -> Array:
    """x as a matrix: the dims before `axis`, and those from there on."""
    axis = call.attrs.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@loose("Squeeze")
def squeeze(call: Call, x: Array, axes: Array | None = None) -> Array:
    """x without the dims `axes` of size 1, or without all of them."""
    return call.xp.squeeze(x, axis=None if axes is None else tuple(_ints(axes)))


@loose("Unsqueeze")
def unsqueeze(call: Call, x: Array, axes: Array) -> Array:
    """x with new dims of size 1 at `axes` of the result."""
    return call.xp.expand_dims(x, axis=tuple(_ints(axes)))


@loose("Expand")
def expand(call: Call, x: Array, shape: Array) -> Array:
    """x broadcast with `shape`, both ways."""
    return call.xp.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(_ints(shape))))


@loose("Tile")
def tile(call: Call, x: Array, repeats: Array) -> Array:
    """x repeated `repeats[i]` times along dim i."""
    return call.xp.tile(x, tuple(_ints(repeats)))


@loose("Slice")
def slice_(
    call: Call, x: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None
) -> Array:
    """`x[start : end : step]` along every axis of `axes`; what lies outside counts as the edge."""
    index: list[slice] = [slice(None)] * x.ndim
    first, last = _ints(starts), _ints(ends)
    where = range(len(first)) if axes is None else _ints(axes)
    for axis, start, end, step in zip(where, first, last, [1] * len(first) if steps is None else _ints(steps)):
        size = x.shape[axis]
        reaches_start = step < 0 and end < -size  # before the first element, which a slice cannot say with a number
        index[axis] = slice(start, None if reaches_start else end, step)
    return x[tuple(index)]


@loose("Range")
def range_(call: Call, start: Array, limit: Array, delta: Array) -> Array:
    """start + i * delta, as long as that is before the limit."""
    first, end, step = (float(wide(call.xp, x)) for x in (start, limit, delta))
    count = max(0, math.ceil((end - first) / step))
    return rounded(call, wide(call.xp, start) + call.xp.arange(count).astype(wide(call.xp, delta).dtype) * delta)


@loose("ConstantOfShape")
def constant_of_shape(call: Call, shape: Array) -> Array:
    """A tensor of `shape` full of `value`, by default 0."""
    return call.xp.full(tuple(_ints(shape)), call.attrs.get("value", (0,))[0], call.outs[0].dtype)


def _register_reduction(op: str) -> None:
    function = find(op)

    @loose(op)
    def reduce(call: Call, x: Array, axes: Array | None = None) -> Array:
        """Over the axes that are an input or, in older opsets, an attribute; none mean all, or with a flag no dim."""
        chosen = list(call.attrs.get("axes") or ()) if axes is None else _ints(axes)
        if not chosen and not call.attrs.get("noop_with_empty_axes", 0):
            chosen = list(range(x.ndim))
        return function(replace(call, attrs={**call.attrs, "axes": chosen}), x)


for _op in REDUCTIONS:
    _register_reduction(_op)


@loose("Pow")
def pow_(call: Call, x: Array, y: Array) -> Array:
    """x to the power of y."""
    return find("Pow")(_shaped(call, np.broadcast_shapes(x.shape, y.shape)), x, y)


def _register_choice(op: str) -> None:
    function = find(op)

    @loose(op)
    def choose(call: Call, x: Array) -> Array:
        """Where the greatest or least entry along `axis` is."""
        shape, axis = list(x.shape), call.attrs.get("axis", 0) % x.ndim
        shape[axis : axis + 1] = [1] if call.attrs.get("keepdims", 1) else []
        return function(_shaped(call, shape), x)


for _op in ("ArgMax", "ArgMin"):
    _register_choice(_op)


@loose("TopK")
def top_k(call: Call, x: Array, k: Array) -> tuple[Array, Array]:
    """The k greatest (or least) entries along `axis`, and where they are."""
    result: tuple[Array, Array] = find("TopK")(replace(call, attrs={**call.attrs, "k": _ints(k)[0]}), x)
    return result


@loose("CumSum")
def cum_sum(call: Call, x: Array, axis: Array) -> Array:
    """Running sums along `axis`."""
    return find("CumSum")(replace(call, attrs={**call.attrs, "axis": _ints(axis)[0]}), x)


@loose("Gemm")
def gemm(call: Call, a: Array, b: Array, c: Array | None = None) -> Array:
    """alpha a b + beta c, of matrices; with `transA`, `transB` of their transposes."""
    a, b = (wide(call.xp, x.T if call.attrs.get(flag, 0) else x) for x, flag in ((a, "transA"), (b, "transB")))
    product = call.attrs.get("alpha", 1.0) * (a @ b)
    return rounded(call, product if c is None else product + call.attrs.get("beta", 1.0) * wide(call.xp, c))


@loose("Split")
def split(call: Call, x: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    """x cut along `axis` into pieces of `sizes`, or into equal ones of which the last may be smaller."""
    axis = call.attrs.get("axis", 0)
    if sizes is None:
        step = -(-x.shape[axis] // len(call.outs))
        ends = [step * (i + 1) for i in range(len(call.outs) - 1)]
    else:
        ends = np.cumsum(_ints(sizes)[:-1]).tolist()
    return tuple(call.xp.split(x, ends, axis=axis))


def _shaped(call: Call, shape: Sequence[int]) -> Call:
    """The call with an output of a known shape, for a kernel that asks."""
    return replace(call, outs=(TensorType(call.outs[0].dtype, tuple(shape)),))


def _ints(x: Array) -> list[int]:
    """Integers of a tensor, on the host."""
    return [int(number) for number in x.reshape(-1).tolist()]
