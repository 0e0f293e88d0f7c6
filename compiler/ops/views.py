"""Ops that move or rename dims: Reshape, Transpose, Expand, Concat, Split, Slice, Pad, Tile, Trilu."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from onnxmesh.compiler.ir import segments as algebra
from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Port, Seen, Strategy, broadcast, numbered, register
from onnxmesh.runtime.placement import Partial, Placement, R, Segments, Shard


def reshape(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """From the shapes alone (compiler/ir/segments.py: reshape)."""
    if isinstance(placement, Partial):
        yield Strategy("partial", (placement,), (placement,))
        return
    if not isinstance(placement, Shard) or view.ins[0] is None:
        return
    ours, theirs = (view.outs[0], view.ins[0]) if port.is_output else (view.ins[0], view.outs[0])
    found = algebra.reshape(ours, theirs, placement.dim, placement.segments, view.ranks)
    if found is not None:
        other = Shard(*found)
        yield Strategy("view", (other,), (placement,)) if port.is_output else Strategy("view", (placement,), (other,))


def transpose(view: OpView) -> Factors:
    """Permuted dims."""
    shape = view.ins[0]
    assert shape is not None
    perm = view.attr("perm") or tuple(reversed(range(len(shape))))
    labels = numbered(shape)
    return Factors((labels,), (tuple(labels[p] for p in perm),), linear=(frozenset({0}),))


def expand(view: OpView) -> Factors:
    """Output dims; those that the input broadcasts come from a replicated input."""
    return Factors(broadcast(view.ins, view.outs[0]), (numbered(view.outs[0]),), linear=(frozenset({0}),))


def _variants(sizes: Sequence[int], known: int, cut: Segments, ranks: int) -> Iterable[list[Segments]]:
    """Cuts for all pieces of a dim when that of piece `known` is given.

    The others take their natural cut, or are whole. Pieces of the same size are also cut alike (k and v heads that
    several ranks share); they are never whole beside one that is cut, which would only multiply the choices.
    """
    others = [algebra.natural(size, ranks) for size in sizes]
    first = [(cuts[-1] if cuts else algebra.whole(size, ranks)) for cuts, size in zip(others, sizes)]
    second = [cuts[0] if cuts and len(cuts) == 1 else algebra.whole(size, ranks) for cuts, size in zip(others, sizes)]
    third = [cut if size == sizes[known] else algebra.whole(size, ranks) for size in sizes]
    alike = [cut if size == sizes[known] else some for some, size in zip(first, sizes)]
    seen = []
    for variant in (first, second, third, alike):
        variant[known] = cut
        if variant not in seen:
            seen.append(variant)
            yield variant


def _place(dim: int, cut: Segments, ranks: int) -> Placement:
    return R if algebra.is_whole(cut, ranks) else Shard(dim, cut)


def _axis(view: OpView, shape: Sequence[int]) -> int:
    return int(view.attr("axis", 0)) % len(shape)


def concat(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """The joined dim: the cuts of the parts, one after the other; other dims pass."""
    axis = _axis(view, view.outs[0])
    shapes = [shape for shape in view.ins if shape is not None]
    yield from _joined(view, port, placement, axis, [shape[axis] for shape in shapes], joined_is_output=True)


def split(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """The split dim: the segments fall to the pieces; a piece's boundary never falls inside a segment."""
    assert view.ins[0] is not None
    axis = _axis(view, view.ins[0])
    yield from _joined(view, port, placement, axis, [out[axis] for out in view.outs], joined_is_output=False)


def _joined(
    view: OpView, port: Port, placement: Placement, axis: int, sizes: list[int], *, joined_is_output: bool
) -> Iterable[Strategy]:
    """Concat and Split are one rule read in two directions: a joined tensor and its pieces along `axis`."""

    def strategy(factor: str, pieces: Sequence[Placement], joined: Placement) -> Strategy:
        return Strategy(factor, *((tuple(pieces), (joined,)) if joined_is_output else ((joined,), tuple(pieces))))

    if isinstance(placement, Partial):
        yield strategy("partial", [placement] * len(sizes), placement)
    if not isinstance(placement, Shard):
        return
    if placement.dim != axis:
        yield strategy("other", [placement] * len(sizes), placement)
        return
    if port.is_output == joined_is_output:
        cuts = algebra.split(placement.segments, sizes)
        if cuts is not None:
            yield strategy("join", [_place(axis, cut, view.ranks) for cut in cuts], placement)
        return
    for variant in _variants(sizes, port.index, placement.segments, view.ranks):
        joined = Shard(axis, algebra.concat(variant))
        yield strategy("join", [_place(axis, cut, view.ranks) for cut in variant], joined)


def concat_pairs(view: OpView, port: Port, placement: Placement, seen: Seen) -> Iterable[Strategy]:
    """Two parts, each cut as its own neighbours want it: Concat(attention, mlp) with a gated mlp."""
    yield from _paired(view, port, placement, seen, _axis(view, view.outs[0]), joined_is_output=True)


def split_pairs(view: OpView, port: Port, placement: Placement, seen: Seen) -> Iterable[Strategy]:
    """Two pieces, each cut as its own neighbours want it: a fused q, k, v and gated mlp."""
    assert view.ins[0] is not None
    yield from _paired(view, port, placement, seen, _axis(view, view.ins[0]), joined_is_output=False)


def _paired(
    view: OpView, port: Port, placement: Placement, seen: Seen, axis: int, *, joined_is_output: bool
) -> Iterable[Strategy]:
    count = len(view.ins if joined_is_output else view.outs)
    if count != 2 or port.is_output == joined_is_output:
        return
    if not isinstance(placement, Shard) or placement.dim != axis:
        return
    for other in seen(Port(port.is_output, 1 - port.index)):
        if isinstance(other, Shard) and other.dim == axis:
            pieces = (placement, other) if port.index == 0 else (other, placement)
            joined = (Shard(axis, algebra.concat([piece.segments for piece in pieces])),)
            yield Strategy("join", *((pieces, joined) if joined_is_output else (joined, pieces)))


def slice_(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """Untouched dims pass; on a sliced dim (step 1) the range must be whole segments."""
    if isinstance(placement, Partial):
        yield Strategy("partial", (placement,), (placement,))
    if not isinstance(placement, Shard) or view.ins[0] is None:
        return
    dim = placement.dim
    axes, steps, starts = view.attr("axes"), view.attr("steps"), view.attr("starts")
    touched = dim in axes and view.ins[0][dim] != view.outs[0][dim]
    if not touched:
        if dim not in axes or steps[axes.index(dim)] == 1:
            yield Strategy("other", (placement,), (placement,))
        return
    if steps[axes.index(dim)] != 1:
        return
    start, count = starts[axes.index(dim)], view.outs[0][dim]
    sizes = [start, count, view.ins[0][dim] - start - count]
    if not port.is_output:
        cuts = algebra.split(placement.segments, sizes)
        if cuts is not None and cuts[1]:
            yield Strategy("range", (placement,), (_place(dim, cuts[1], view.ranks),))
        return
    kept = [i for i, size in enumerate(sizes) if size > 0]
    for variant in _variants([sizes[i] for i in kept], kept.index(1), placement.segments, view.ranks):
        yield Strategy("range", (Shard(dim, algebra.concat(variant)),), (placement,))


def slice_localise(view: OpView, strategy: Strategy) -> dict[str, Any]:
    """The start of the range among a rank's own elements."""
    placement = strategy.ins[0]
    if strategy.factor != "range" or not isinstance(placement, Shard):
        return {}
    axes, starts = view.attr("axes"), list(view.attr("starts"))
    at = axes.index(placement.dim)
    ends = accumulate((s.size for s in placement.segments), initial=0)
    starts[at] = sum(s.local(view.ranks) for s, end in zip(placement.segments, ends) if end < starts[at])
    return {"starts": starts}


def pad(view: OpView) -> Factors:
    """Dims without padding."""
    shape, pads = view.ins[0], view.attr("pads")
    assert shape is not None
    whole = [before == after == 0 for before, after in zip(pads[: len(shape)], pads[len(shape) :])]
    labels = tuple(label if kept else None for label, kept in zip(numbered(shape), whole))
    rest: tuple[Labels, ...] = tuple((None,) * len(other or ()) for other in view.ins[1:])
    return Factors((labels, *rest), (labels,), linear=() if rest else (frozenset({0}),))


def tile(view: OpView) -> Factors:
    """Dims that are not repeated."""
    shape = view.outs[0]
    labels = tuple(label if n == 1 else None for label, n in zip(numbered(shape), view.attr("repeats")))
    return Factors((labels,), (labels,), linear=(frozenset({0}),))


def tile_repeated(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """A repeated dim: the cut of the input is that of every repetition."""
    if not isinstance(placement, Shard) or view.attr("repeats")[placement.dim] < 2:
        return
    dim, cut, repeats = placement.dim, placement.segments, view.attr("repeats")[placement.dim]
    period = cut[: len(cut) // repeats] if port.is_output else cut
    if (not port.is_output or period * repeats == cut) and algebra.fits(period, view.ranks):
        yield Strategy("repeated", (Shard(dim, period),), (Shard(dim, period * repeats),))


def trilu(view: OpView) -> Factors:
    """All dims but the matrix."""
    labels = (*numbered(view.outs[0])[:-2], None, None)
    return Factors((labels,), (labels,), linear=(frozenset({0}),))


register("Reshape", ports=reshape, moves=False)
register("Transpose", factors=transpose)
register("Expand", factors=expand)
register("Concat", ports=concat, pairs=concat_pairs)
register("Split", ports=split, pairs=split_pairs)
register("Slice", ports=slice_, localise=slice_localise)
register("Pad", factors=pad)
register("Tile", factors=tile, ports=tile_repeated)
register("Trilu", factors=trilu)
