"""How a cut on a second mesh axis passes the collectives of the first.

Dims that the collective does not touch pass unchanged, and so does everything through those that touch none. On the
dim that is gathered or scattered, segments pass by compiler/ir/segments.py: through.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnxmesh.compiler.ir import segments as algebra
from onnxmesh.compiler.ir.rule import OpView, Port, Strategy, register
from onnxmesh.runtime.placement import Placement, Segment, Segments, Shard
from onnxmesh.runtime.plan import KINDS

COLLECTIVES = KINDS
"""Ops that send; Shard only takes a slice of what is there."""

VIEWS = ("Reshape", "Identity")
"""Ops that rename bytes: they become no instructions."""


def unpack(flat: Iterable[int]) -> Segments:
    """Segments from the flattened attribute `[size, copies, ...]`."""
    numbers = list(flat)
    return tuple(Segment(size, copies) for size, copies in zip(numbers[::2], numbers[1::2]))


def pack(cut: Segments) -> list[int]:
    """The inverse of `unpack`."""
    return [number for segment in cut for number in (segment.size, segment.copies)]


def unchanged(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """AllReduce, Shift, Broadcast, ReduceTo: any cut passes."""
    if isinstance(placement, Shard):
        yield Strategy("pass", (placement,) * len(view.ins), (placement,) * len(view.outs))


def beside(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """GatherTo, ScatterFrom: the cuts of other dims pass."""
    if isinstance(placement, Shard) and placement.dim != view.attr("dim"):
        yield Strategy("pass", (placement,), (placement,))


def moved(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """AllGather (grows `dim`), ReduceScatter and Shard (shrink `dim`)."""
    if not isinstance(placement, Shard):
        return
    if placement.dim != view.attr("dim"):
        yield Strategy("pass", (placement,), (placement,))
        return
    first = unpack(view.attr("segments"))
    grows = view.op == "AllGather"
    other = algebra.through(placement.segments, first, view.attr("ranks"), gather=port.is_output != grows)
    yield from _pair(view, port, placement, other)


def all_to_all(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """S(concat_dim) -> S(split_dim): concat_dim grows, split_dim shrinks."""
    if not isinstance(placement, Shard):
        return
    ranks = view.attr("ranks")
    if placement.dim == view.attr("concat_dim"):
        first, grows = unpack(view.attr("concat_segments")), True
    elif placement.dim == view.attr("split_dim"):
        first, grows = unpack(view.attr("split_segments")), False
    else:
        yield Strategy("pass", (placement,), (placement,))
        return
    other = algebra.through(placement.segments, first, ranks, gather=port.is_output != grows)
    yield from _pair(view, port, placement, other)


def _pair(view: OpView, port: Port, placement: Shard, cut: Segments | None) -> Iterable[Strategy]:
    if cut is None or not algebra.fits(cut, view.ranks):
        return
    other = Shard(placement.dim, cut)
    ins, outs = ((other,), (placement,)) if port.is_output else ((placement,), (other,))
    yield Strategy("pass", ins, outs)


def localise(view: OpView, strategy: Strategy) -> dict[str, object]:
    """The first axis's segments, as large as the second axis leaves them."""
    changed: dict[str, object] = {}
    for dim, name, whole in (
        (view.attr("dim"), "segments", strategy.outs[0] if view.op == "AllGather" else strategy.ins[0]),
        (view.attr("split_dim"), "split_segments", strategy.ins[0]),
        (view.attr("concat_dim"), "concat_segments", strategy.outs[0]),
    ):
        if dim is None or not isinstance(whole, Shard) or whole.dim != dim:
            continue
        first = unpack(view.attr(name))
        pieces = algebra.split(whole.segments, [s.size for s in first])
        assert pieces is not None
        sizes = [sum(s.local(view.ranks) for s in piece) for piece in pieces]
        changed[name] = pack(tuple(Segment(size, s.copies) for size, s in zip(sizes, first)))
    return changed


register("AllReduce", "Shift", "Broadcast", "ReduceTo", ports=unchanged)
register("GatherTo", "ScatterFrom", ports=beside)
register("AllGather", "ReduceScatter", "Shard", ports=moved, localise=localise)
register("AllToAll", ports=all_to_all, localise=localise)
