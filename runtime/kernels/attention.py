"""Attention in one piece, attention by blocks of keys, and rotary embeddings.

Scores are never held for more than `_SCORE_BYTES`: heads and query rows are worked through in chunks.
Merging blocks is the online softmax (Milakov and Gimelshein, 2018; FlashAttention).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from onnxmesh.runtime.dtypes import dtype, float_max
from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel

_SCORE_BYTES = 16 << 20


@kernel("Attention")
def attention(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    q_pos: Array | None = None,
    k_pos: Array | None = None,
) -> Array:
    """softmax(scale * q k^T -> softcap -> + mask) v, rows without keys as `masked_row` says.

    q [b, h, s, d], k [b, g, t, d], v [b, g, t, e], mask broadcasting to [b, h, s, t], q_pos [s], k_pos [t]
    -> [b, h, s, e]; g divides h. docs/dialect.md has the whole definition.
    """
    out, _, total = _attend(call, q, k, v, _Visibility(mask, q_pos, k_pos))
    return rounded(call, _fill(call, out, total))


@kernel("AttentionBlock")
def attention_block(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    q_pos: Array | None = None,
    k_pos: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Attention over the keys that are here: o [b, h, s, e], row maxima m and sums l [b, h, s, 1].

    l is the sum of exp(score - m); a row without keys has o = 0, m = -inf, l = 0.
    """
    results = _attend(call, q, k, v, _Visibility(mask, q_pos, k_pos))
    return tuple(rounded(call, value, i) for i, value in enumerate(results))


@kernel("AttentionMerge")
def attention_merge(
    call: Call, o1: Array, m1: Array, l1: Array, o2: Array, m2: Array, l2: Array
) -> tuple[Array, Array, Array]:
    """o, m, l over the keys of both blocks; m, l may be given as a log-sum-exp and 1."""
    xp = call.xp
    o1, m1, l1, o2, m2, l2 = (wide(xp, x) for x in (o1, m1, l1, o2, m2, l2))
    highest = xp.maximum(m1, m2)
    reference = xp.where(xp.isneginf(highest), xp.zeros_like(highest), highest)
    weight1, weight2 = l1 * xp.exp(m1 - reference), l2 * xp.exp(m2 - reference)
    total = weight1 + weight2
    divisor = xp.where(total == 0, xp.ones_like(total), total)
    values = ((o1 * weight1 + o2 * weight2) / divisor, highest, total)
    return tuple(rounded(call, value, i) for i, value in enumerate(values))


@kernel("AttentionFinish")
def attention_finish(call: Call, o: Array, total: Array) -> Array:
    """o with the rows whose sum l is 0 given the value that `masked_row` says."""
    return rounded(call, _fill(call, wide(call.xp, o), total))


@kernel("Rotary")
def rotary(call: Call, x: Array, cos: Array, sin: Array) -> Array:
    """x * cos + rotate(x) * sin over the last dim d (RoFormer, Su et al., 2021).

    rotate(x) is (-x2, x1) of the two halves, or with `interleaved` of every pair. cos and sin broadcast to
    x; with a last dim of d/2 they hold one value a pair.
    """
    xp, half, interleaved = call.xp, x.shape[-1] // 2, call.attrs.get("interleaved", 0)
    x, cos, sin = wide(xp, x), wide(xp, cos), wide(xp, sin)
    at = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    first, second = (x[..., part] for part in at)
    result = xp.empty(call.outs[0].shape, x.dtype)
    cos1, cos2, sin1, sin2 = _per_half(cos, half, at) + _per_half(sin, half, at)
    result[..., at[0]] = first * cos1 - second * sin1
    result[..., at[1]] = second * cos2 + first * sin2
    return rounded(call, result)


def _per_half(table: Array, half: int, at: tuple[slice, slice]) -> tuple[Array, Array]:
    """A table's values for both entries of the pairs."""
    if table.shape[-1] in (1, half):
        return table, table
    return table[..., at[0]], table[..., at[1]]


def _fill(call: Call, out: Array, total: Array) -> Array:
    """`out` with its empty rows 0 or NaN; where masked rows are uniform none is empty."""
    value = 0.0 if call.attrs.get("masked_row", "nan") == "zero" else math.nan
    empty = total == 0
    if call.xp.__name__ == "numpy" and not empty.any():  # elsewhere looking would mean to wait for the device
        return out
    return call.xp.where(empty, call.xp.asarray(value, out.dtype), out)


@dataclass(frozen=True)
class _Visibility:
    """What decides which keys a query sees."""

    mask: Array | None
    q_pos: Array | None
    k_pos: Array | None

    def apply(self, xp: Any, scores: Array, block: _Block, hidden: float) -> Array:
        """The scores [heads, group, rows, t] with hidden ones replaced and additive masks added."""
        mask = None if self.mask is None else block.mask(self.mask, scores.shape[1])
        if mask is not None and mask.dtype == bool:
            scores = xp.where(mask, scores, scores.dtype.type(hidden))
        elif mask is not None:
            scores = scores + wide(xp, mask).astype(scores.dtype, copy=False)
        if self.q_pos is None or self.k_pos is None:
            return scores
        visible = self.k_pos[None, :] <= self.q_pos[block.rows][:, None]
        return xp.where(visible, scores, scores.dtype.type(hidden))


@dataclass(frozen=True)
class _Block:
    """The query rows of some heads of k and v in one batch entry."""

    batch: int
    heads: slice
    rows: slice

    def mask(self, mask: Array, group: int) -> Array:
        """The mask's part as [heads or 1, group or 1, rows or 1, t or 1]."""
        mask = mask[0 if mask.shape[0] == 1 else self.batch]
        mask = mask if mask.shape[1] == 1 else mask[:, self.rows]
        if mask.shape[0] == 1:
            return mask[None]
        return mask.reshape(-1, group, *mask.shape[1:])[self.heads]


def _blocks(b: int, g: int, group: int, s: int, t: int, itemsize: int) -> Iterator[_Block]:
    budget = max(1, _SCORE_BYTES // (itemsize * group * max(1, t)))
    heads, rows = max(1, budget // max(1, s)), min(budget, max(1, s))
    for batch in range(b):
        for head in range(0, g, heads):
            for row in range(0, s, rows):
                yield _Block(batch, slice(head, min(g, head + heads)), slice(row, min(s, row + rows)))


def _attend(call: Call, q: Array, k: Array, v: Array, visibility: _Visibility) -> tuple[Array, Array, Array]:
    """(o, m, l) in the computing dtype; o is 0 where l is."""
    xp, (b, h, s, _), (g, t) = call.xp, q.shape, k.shape[1:3]
    work = xp.result_type(wide(xp, q[:0]).dtype, xp.float32)
    out = xp.zeros((b, h, s, v.shape[3]), work)
    highest, total = xp.full((b, h, s, 1), -math.inf, work), xp.zeros((b, h, s, 1), work)
    if t == 0 or out.size == 0:
        return out, highest, total
    for block in _blocks(b, g, h // g, s, t, work.itemsize):
        scores = _scores(call, q, k, block, work, h // g)
        hidden = -float_max(work) if call.attrs.get("masked_row") == "uniform" else -math.inf
        scores = visibility.apply(xp, scores, block, hidden)
        m = scores.max(axis=-1, keepdims=True)
        reference = xp.where(xp.isneginf(m), xp.zeros_like(m), m)
        powers = scores
        powers -= reference
        xp.exp(powers, out=powers)
        l = powers.sum(axis=-1, keepdims=True)
        values = v[block.batch, block.heads].astype(work, copy=False)
        flat = powers.reshape(powers.shape[0], -1, t)
        o = xp.matmul(flat, values).reshape(*l.shape[:3], -1) / xp.where(l == 0, xp.ones_like(l), l)
        for array, part in ((out, o), (highest, m), (total, l)):
            array[block.batch].reshape(g, h // g, s, -1)[block.heads, :, block.rows] = part
    return out, highest, total


def _scores(call: Call, q: Array, k: Array, block: _Block, work: Any, group: int) -> Array:
    """A new array [heads, group, rows, t]: the scaled, capped scores before any mask."""
    xp, attrs = call.xp, call.attrs
    scale = attrs["scale"] if attrs.get("scale") is not None else 1 / math.sqrt(q.shape[-1])
    queries = q[block.batch].reshape(k.shape[1], group, *q.shape[2:])[block.heads, :, block.rows]
    queries = queries.astype(work) * work.type(scale)
    heads, _, rows, d = queries.shape
    keys = k[block.batch, block.heads].astype(work, copy=False).swapaxes(1, 2)
    scores = xp.matmul(queries.reshape(heads, group * rows, d), keys).reshape(heads, group, rows, -1)
    if attrs.get("softcap", 0.0):
        scores = attrs["softcap"] * xp.tanh(scores / attrs["softcap"])
    if attrs.get("qk_dtype"):
        scores = scores.astype(dtype(attrs["qk_dtype"])).astype(work)
    return scores
