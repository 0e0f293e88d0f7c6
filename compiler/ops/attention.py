"""Attention and rotary embedding.

The strategies of attention on one axis are rows of one table:

| factor | cut | gives |
|---|---|---|
| b | batch | |
| h | heads of q, k, v | tensor parallel; with its neighbours on s: Ulysses |
| s | rows of q; k and v whole | AllGather-KV |
| t | rows of q, and of k and v | Ring (expansion `ring`) |
| kv | k and v alone | split KV, the decode case (expansion `split_kv`) |
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from onnxmesh.compiler.ir import segments as algebra
from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Port, Strategy, broadcast, numbered, register
from onnxmesh.runtime.placement import Placement, R, Segment, Segments, Shard

Q, K, V, MASK, Q_POS, K_POS = range(6)


def attention(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """q[b,h,s,d], k[b,g,t,d], v[b,g,t,e], mask[b|1,h|1,s|1,t|1], q_pos[s], k_pos[t] -> o[b,h,s,e], (m, l)."""
    if not isinstance(placement, Shard):
        return
    at, cut = placement.dim, placement.segments
    if port.is_output or port.index == Q:
        if at == 0:
            yield from _same(view, "b", 0, cut)
        elif at == 1:
            yield from _heads(view, cut)
        elif at == 2:
            yield from _same(view, "s", 2, cut)
            yield from _ring(view, cut)
    elif port.index in (K, V):
        if at == 0:
            yield from _same(view, "b", 0, cut)
        elif at == 1:
            yield from _heads_from_kv(view, cut)
        elif at == 2:
            yield from _ring_from_kv(view, cut)
            yield from _split_kv(view, cut)
    elif port.index == MASK:
        if at == 1:
            yield from _heads(view, cut)
        elif at in (0, 2):
            yield from _same(view, "b" if at == 0 else "s", at, cut)


def _build(
    view: OpView, factor: str, dims: dict[int, Placement], out: Placement, expand: str = ""
) -> Iterable[Strategy]:
    ins = tuple(dims.get(i, R) if shape is not None else R for i, shape in enumerate(view.ins))
    strategy = Strategy(factor, ins, tuple(out for _ in view.outs), expand)
    if all(p.fits(view.ranks) for p in strategy.ins + strategy.outs if isinstance(p, Shard)):
        yield strategy


def _mask(view: OpView, dim: int, cut: Segments) -> Placement:
    """The mask's placement for a cut of one of its dims; size-1 dims broadcast."""
    mask = view.ins[MASK] if len(view.ins) > MASK else None
    return Shard(dim, cut) if mask is not None and mask[dim] > 1 else R


def _same(view: OpView, factor: str, dim: int, cut: Segments) -> Iterable[Strategy]:
    """The batch (q, k, v alike) or the rows of q alone."""
    placed: dict[int, Placement] = {Q: Shard(dim, cut), MASK: _mask(view, dim, cut)}
    if factor == "b":
        placed |= {K: Shard(0, cut), V: Shard(0, cut)}
    else:
        placed[Q_POS] = Shard(0, cut)
    yield from _build(view, factor, placed, Shard(dim, cut))


def _heads(view: OpView, cut: Segments) -> Iterable[Strategy]:
    kv = algebra.kv_heads(cut, _group(view), view.ranks)
    if kv is None:
        return
    keys: Placement = R if algebra.is_whole(kv, view.ranks) else Shard(1, kv)
    placed: dict[int, Placement] = {Q: Shard(1, cut), K: keys, V: keys, MASK: _mask(view, 1, cut)}
    yield from _build(view, "h", placed, Shard(1, cut))


def _heads_from_kv(view: OpView, cut: Segments) -> Iterable[Strategy]:
    group = _group(view)
    queries = tuple(Segment(s.size * group, s.copies) for s in cut)
    if all(s.copies == 1 or s.copies == view.ranks for s in cut):
        yield from _heads(view, queries)


def _group(view: OpView) -> int:
    q, k = view.ins[Q], view.ins[K]
    assert q is not None and k is not None
    return q[1] // k[1]


def _ring(view: OpView, cut: Segments) -> Iterable[Strategy]:
    """Rows of q, k and v. Keys of another length than q's take their natural cut."""
    q, k = view.ins[Q], view.ins[K]
    assert q is not None and k is not None
    if not _ring_cut(cut, view):
        return
    cuts = [cut] if q[2] == k[2] else [c for c in algebra.natural(k[2], view.ranks) if _ring_cut(c, view)]
    for keys in cuts[-1:]:
        yield from _ring_build(view, cut, keys)


def _ring_from_kv(view: OpView, cut: Segments) -> Iterable[Strategy]:
    q, k = view.ins[Q], view.ins[K]
    assert q is not None and k is not None
    if not _ring_cut(cut, view):
        return
    if q[2] == k[2]:
        yield from _ring_build(view, cut, cut)
    else:
        for rows in algebra.natural(q[2], view.ranks)[-1:]:
            yield from _ring_build(view, rows, cut)


def _ring_cut(cut: Segments, view: OpView) -> bool:
    """Whether attention to parts of the keys can be merged; its statistics are float32, too narrow for float64."""
    return all(s.copies in (1, view.ranks) for s in cut) and "float64" not in view.in_dtypes


def _ring_build(view: OpView, rows: Segments, keys: Segments) -> Iterable[Strategy]:
    placed: dict[int, Placement] = {
        Q: Shard(2, rows),
        K: Shard(2, keys),
        V: Shard(2, keys),
        MASK: _mask(view, 2, rows),
        Q_POS: Shard(0, rows),
    }
    yield from _build(view, "t", placed, Shard(2, rows), "ring")


def _split_kv(view: OpView, cut: Segments) -> Iterable[Strategy]:
    """Every rank attends to its own keys; one merge by log-sum-exp."""
    if view.op != "Attention" or not _ring_cut(cut, view):
        return
    positions = len(view.ins) > K_POS and view.ins[K_POS] is not None
    if positions and view.attr("masked_row") == "uniform" and any(s.copies > 1 for s in cut):
        return  # a key hidden by its position has the lowest score on every rank that holds it: it counts twice
    placed: dict[int, Placement] = {K: Shard(2, cut), V: Shard(2, cut), MASK: _mask(view, 3, cut), K_POS: Shard(0, cut)}
    yield from _build(view, "kv", placed, R, "split_kv")


def attention_flops(view: OpView) -> float:
    """2 b h s t (d + e). A causal mask halves what is needed; both halves are counted, as for every backend."""
    q, v = view.ins[Q], view.ins[V]
    assert q is not None and v is not None
    return 2.0 * prod(q[:3]) * v[2] * (q[3] + v[3])


def rotary(view: OpView) -> Factors:
    """x[..., d], cos, sin: all dims but the last, which is rotated within."""
    ins = [(*labels[:-1], None) for labels in broadcast(view.ins, view.outs[0])[:1]]
    tables = [(*broadcast([shape[:-1] if shape else None], view.outs[0][:-1])[0], None) for shape in view.ins[1:]]
    return Factors((*ins, *tables), ((*numbered(view.outs[0])[:-1], None),))


def merge(view: OpView) -> Factors:
    """AttentionMerge, AttentionFinish: b, h, s; and e for the values."""

    def labels(shape: tuple[int, ...]) -> Labels:
        return tuple(label if size > 1 else None for label, size in zip(("b", "h", "s", None), shape))

    return Factors(tuple(labels(shape or ()) for shape in view.ins), tuple(labels(shape) for shape in view.outs))


register("Attention", "AttentionBlock", ports=attention, flops=attention_flops)
register("AttentionMerge", "AttentionFinish", factors=merge)
register("Rotary", factors=rotary)
