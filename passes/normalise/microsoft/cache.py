"""Caches of keys and values in ONNX Runtime's attention ops: how full they are, what stands where, who sees what.

How many keys a cache holds may be data (`seqlens_k`, `past_sequence_length`). Then shapes are those of the whole
buffer: new keys are put at their place by a condition, and keys behind them are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import constant, dtype_of, shape_of


@dataclass(frozen=True)
class Fill:
    """How many keys of a cache were there before.

    Attributes:
        count: a number, or int64 `[1]` (all sequences alike) or `[batch]`.
    """

    count: int | ir.Value

    @property
    def same(self) -> bool:
        """Whether all sequences of the batch have as many."""
        return isinstance(self.count, int) or shape_of(self.count) == (1,)


def fill_of(b: Builder, count: ir.Value, minus: int = 0) -> Fill:
    """The fill that a tensor of one number, or of one a sequence, holds; less `minus`, but never below 0."""
    known = constant(count)
    if known is not None and known.size and np.all(known == known.reshape(-1)[0]):
        return Fill(max(0, int(known.reshape(-1)[0]) - minus))
    flat = b.op("Cast", b.reshape(count, prod(shape_of(count))), to=int(ir.DataType.INT64))
    if minus > 0:
        flat = b.op("Max", b.op("Sub", flat, b.constant(np.int64(minus))), b.constant(np.int64(0)))
    return Fill(flat)


def insert(b: Builder, cache: ir.Value, x: ir.Value, fill: Fill, size: int | None = None) -> ir.Value:
    """The cache `[b, h, t, d]` with `x` `[b, h, s, d]` behind what it holds.

    It keeps its length, or has `size` where that is more. Where the fill is data, all sequences have as many, or `x`
    is one token of each.
    """
    length = max(shape_of(cache)[2], size or 0)
    if isinstance(fill.count, int):
        return _inserted_at(b, cache, x, fill.count, length)
    count = shape_of(x)[2]
    offset = b.op("Sub", _steps(b, length), fill.count) if fill.same else None
    if count == 1:
        position = b.reshape(fill.count, shape_of(fill.count)[0], 1, 1, 1)
        new, inside = x, b.op("Equal", b.constant(np.arange(length, dtype=np.int64).reshape(1, 1, -1, 1)), position)
    else:
        assert offset is not None, "several tokens, and fills that differ"
        limits = [b.constant(np.int64(n)) for n in (0, count - 1)]
        rows = b.op("Clip", offset, *limits)
        new = b.op("Gather", x, rows, axis=2)
        inside = b.reshape(b.op("Equal", rows, offset), 1, 1, length, 1)
    grows = length - shape_of(cache)[2] == count  # then new keys stand last, if none is padding
    behind = b.op("Concat", cache, x, axis=2) if grows else _stretched(b, cache, length)
    return b.op("Where", inside, new, behind)


def _inserted_at(b: Builder, cache: ir.Value, x: ir.Value, past: int, length: int) -> ir.Value:
    held, stop = shape_of(cache)[2], past + shape_of(x)[2]
    pieces = [b.slice(cache, 2, 0, past) if past < held else _stretched(b, cache, past), x] if past else [x]
    if stop < held:
        pieces.append(b.slice(cache, 2, stop, held))
    joined = b.op("Concat", *pieces, axis=2) if len(pieces) > 1 else x
    return _stretched(b, joined, length)


def _stretched(b: Builder, cache: ir.Value, length: int) -> ir.Value:
    """A cache of at least so many keys; those behind are zeros."""
    batch, heads, held, width = shape_of(cache)
    if held >= length:
        return cache
    zero = b.constant(0, dtype_of(cache))
    return b.op("Concat", cache, b.own("Expand", [zero], (batch, heads, length - held, width)), axis=2)


def _steps(b: Builder, count: int) -> ir.Value:
    return b.constant(np.arange(count, dtype=np.int64))


def positions(b: Builder, fill: Fill, count: int, shape: tuple[int, ...] = (1, -1)) -> ir.Value:
    """The positions of `count` new tokens of every sequence, or of all alike, as int64 of that shape."""
    steps = np.arange(count, dtype=np.int64)
    if isinstance(fill.count, int):
        return b.constant((fill.count + steps).reshape(shape))
    rows = shape_of(fill.count)[0]
    column = fill.count if len(shape) == 1 else b.reshape(fill.count, rows, *[1] * (len(shape) - 1))
    return b.op("Add", column, b.constant(steps.reshape(shape)))


@dataclass(frozen=True)
class Seen:
    """Which keys the new tokens see: positions for the normal form's Attention, a boolean mask, or neither."""

    positions: tuple[ir.Value, ir.Value] | None = None
    mask: ir.Value | None = None


def seen(b: Builder, fill: Fill, queries: int, keys: int, *, causal: bool, window: int = -1) -> Seen:
    """What `queries` new tokens see of `keys` keys: those up to themselves (or up to the last new one).

    A window of `n` leaves a token itself and the `n - 1` keys before it.
    """
    if not causal:
        if isinstance(fill.count, int) and fill.count + queries >= keys:
            return Seen()
        fill = Fill(fill.count + queries - 1) if isinstance(fill.count, int) else _later(b, fill.count, queries - 1)
    query = positions(b, fill, queries if causal else 1, (1, 1, -1, 1))
    key = b.constant(np.arange(keys, dtype=np.int64).reshape(1, 1, 1, -1))
    near = None
    if 0 <= window < keys:
        near = b.op("Less", b.op("Sub", query, b.constant(np.int64(window))), key)
    if fill.same:
        row = positions(b, fill, queries if causal else 1, (-1,))
        row = row if causal else b.own("Expand", [row], (queries,))
        return Seen((row, _steps(b, keys)), near)
    visible = b.op("LessOrEqual", key, query)
    return Seen(None, visible if near is None else b.op("And", near, visible))


def _later(b: Builder, count: ir.Value, by: int) -> Fill:
    return Fill(b.op("Add", count, b.constant(np.int64(by))))
