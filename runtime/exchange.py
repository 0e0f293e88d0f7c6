"""How a collective moves memory: what is packed, sent, received and unpacked.

Collectives read and write row-major memory. Where the pieces for the other ranks lie in one run each, they are sent
from where they are; elsewhere they are first packed into staging memory, and likewise on the other side. Both sides
cut a message at the same places, so the ranks always agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.memory import aligned
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Segments, ranges
from onnxmesh.runtime.plan import ROOTED, Buffer, Collective, Program
from onnxmesh.runtime.segments import segments_of

Stage = Callable[[tuple[int, ...], Any], Array]
"""Gives staging memory of a shape and dtype."""
Shape = Sequence[int]


@dataclass
class Moves:
    """What one rank does for a collective, in this order; everything within a step is independent.

    Attributes:
        pack: (from, to) copies before sending.
        native: (kind, from, to, reduction) for what the library has itself: all_reduce, reduce_scatter (from n pieces
            in a row), all_gather (to n pieces in a row).
        sends: (array, position in the group). Messages between two ranks match in order.
        receives: (array, position).
        unpack: (from, to) copies at the end.
    """

    pack: list[tuple[Array, Array]] = field(default_factory=list)
    native: list[tuple[str, Array, Array, str]] = field(default_factory=list)
    sends: list[tuple[Array, int]] = field(default_factory=list)
    receives: list[tuple[Array, int]] = field(default_factory=list)
    unpack: list[tuple[Array, Array]] = field(default_factory=list)


def moves(
    item: Collective, ins: Sequence[Array], outs: Sequence[Array], ranks: int, here: int, stage: Stage
) -> Moves | None:
    """How rank `here` of `ranks` takes part in `item`; None where it is not made of such moves.

    Args:
        ins: row-major arrays.
        outs: row-major arrays that do not overlap `ins`.
    """
    result = Moves()
    for number, (x, out) in enumerate(zip(ins, outs)):
        if not _KINDS[item.kind](result, item.attrs_of(number), x, out, ranks, here, stage):
            return None
    return result


def pushes(
    item: Collective, number: int, x: Array, outs: Sequence[Array], ranks: int, here: int
) -> list[tuple[int, Array, Array]] | None:
    """(position, from, to): what rank `here` copies of its `x` into each rank's result, `outs` by position.

    Together the ranks' copies fill every result, each element once. None where a collective is not made of copies.
    """
    attrs = item.attrs_of(number)
    if item.kind == "Shift":
        to = (here + attrs["offset"]) % ranks
        return [(to, x, outs[to])]
    if item.kind == "AllGather":
        return _pushed_everywhere(attrs, x, outs, ranks, here)
    if item.kind == "AllToAll":
        return _pushed_apart(attrs, x, outs, ranks, here)
    return None


def pulls(item: Collective, number: int, x: Array, out: Array, ranks: int, here: int) -> list[tuple[Array, Array]]:
    """(from, to): the parts of every rank's `x` that a ReduceScatter sums up into this rank's `out`."""
    attrs, copies = item.attrs_of(number), list[tuple[Array, Array]]()
    _copy_spans(copies, x, out, attrs["dim"], ranges(segments_of(attrs["segments"]), ranks, here))
    return copies


def _pushed_everywhere(
    attrs: Mapping[str, Any], x: Array, outs: Sequence[Array], ranks: int, here: int
) -> list[tuple[int, Array, Array]]:
    dim, segments = attrs["dim"], segments_of(attrs["segments"])
    result = []
    locals_ = _spans([s.local(ranks) for s in segments])
    for segment, own, (start, _) in zip(segments, locals_, _spans([s.size for s in segments])):
        if segment.copies >= ranks:  # every rank holds it whole
            to, targets = start, [here]
        elif here % segment.copies:
            continue
        else:
            to, targets = start + here // segment.copies * (own[1] - own[0]), list(range(ranks))
        part = _span(x, dim, own)
        result += [(rank, part, _span(outs[rank], dim, (to, to + own[1] - own[0]))) for rank in targets]
    return result


def _pushed_apart(
    attrs: Mapping[str, Any], x: Array, outs: Sequence[Array], ranks: int, here: int
) -> list[tuple[int, Array, Array]] | None:
    split, concat = attrs["split_dim"], attrs["concat_dim"]
    given, held = segments_of(attrs["split_segments"]), segments_of(attrs["concat_segments"])
    if split == concat or any(s.copies > 1 for s in (*given, *held)):
        return None
    kept = ranges(held, ranks, here)
    own = _spans([stop - start for start, stop in kept])
    result = []
    for rank in range(ranks):
        sent = ranges(given, ranks, rank)
        for a, at in zip(sent, _spans([stop - start for start, stop in sent])):
            for b, part in zip(kept, own):
                to = _span(_span(outs[rank], concat, b), split, at)
                result.append((rank, _span(_span(x, split, a), concat, part), to))
    return result


def staged(kind: str, attrs: Mapping[str, Any], shape: Shape, out: Shape) -> tuple[bool, bool]:
    """Whether a collective packs its input of `shape`, and unpacks its result: there it takes any strides."""
    if kind == "ReduceScatter":
        return not (_is_first(shape, attrs["dim"]) and _is_plain(segments_of(attrs["segments"]))), False
    if kind == "AllGather":
        return False, not _is_first(shape, attrs["dim"])
    if kind == "AllToAll" and attrs["split_dim"] != attrs["concat_dim"]:
        sends_direct = _is_first(shape, attrs["split_dim"])
        return not sends_direct, sends_direct or not _is_first(out, attrs["concat_dim"])
    return False, False


def staging_sizes(program: Program, mesh: Mesh) -> dict[int, int]:
    """Bytes of staging memory by stream: what the largest of its collectives needs."""
    sizes: dict[int, int] = {}
    for item in program.instructions:
        if isinstance(item, Collective):
            needed = staging_bytes(item, program.buffers, mesh.axis_size(item.axis))
            sizes[item.stream] = max(sizes.get(item.stream, 0), needed)
    return sizes


def staging_bytes(item: Collective, buffers: Sequence[Buffer], ranks: int) -> int:
    """Bytes of staging memory that `moves` asks for."""
    total = 0

    def stage(shape: tuple[int, ...], kind: Any) -> Any:
        nonlocal total
        total += aligned(prod(shape) * dtype(kind).itemsize)
        return _Ghost(shape, kind)

    ghosts = [[_Ghost(buffers[i].shape, buffers[i].dtype) for i in side] for side in (item.ins, item.outs)]
    moves(item, ghosts[0], ghosts[1], ranks, 0, stage)
    return total


class _Ghost:
    """An array without memory: as much of one as `moves` looks at."""

    def __init__(self, shape: Shape, dtype: Any) -> None:
        self.shape, self.dtype = tuple(shape), dtype

    def __getitem__(self, key: Any) -> _Ghost:
        key = key if isinstance(key, tuple) else (key,)
        shape: list[int] = []
        for index, size in enumerate(self.shape):
            part = key[index] if index < len(key) else slice(None)
            if isinstance(part, slice):
                shape.append(len(range(*part.indices(size))))
        return _Ghost(shape, self.dtype)


def _all_reduce(
    result: Moves, attrs: Mapping[str, Any], x: Array, out: Array, ranks: int, here: int, stage: Stage
) -> bool:
    result.native.append(("all_reduce", x, out, attrs.get("reduce", "sum")))
    return True


def _reduce_scatter(
    result: Moves, attrs: Mapping[str, Any], x: Array, out: Array, ranks: int, here: int, stage: Stage
) -> bool:
    dim, segments = attrs["dim"], segments_of(attrs["segments"])
    if not (_is_first(x.shape, dim) and _is_plain(segments)):
        packed = stage((ranks, *out.shape), x.dtype)
        for rank in range(ranks):
            _copy_spans(result.pack, x, packed[rank], dim, ranges(segments, ranks, rank))
        x = packed
    result.native.append(("reduce_scatter", x, out, attrs.get("reduce", "sum")))
    return True


def _all_gather(
    result: Moves, attrs: Mapping[str, Any], x: Array, out: Array, ranks: int, here: int, stage: Stage
) -> bool:
    dim, segments = attrs["dim"], segments_of(attrs["segments"])
    locals_ = _spans([s.local(ranks) for s in segments])
    wholes = _spans([s.size for s in segments])
    apart = []
    for segment, own, whole in zip(segments, locals_, wholes):
        if segment.copies >= ranks:
            result.pack.append((_span(x, dim, own), _span(out, dim, whole)))
        elif segment.copies == 1 and _is_first(x.shape, dim):
            result.native.append(("all_gather", _span(x, dim, own), _span(out, dim, whole), ""))
        else:
            apart.append((segment, own, whole))
    if apart:
        _gather_apart(result, x, out, dim, ranks, apart, len(apart) == len(segments), stage)
    return True


def _gather_apart(
    result: Moves, x: Array, out: Array, dim: int, ranks: int, apart: Sequence[Any], is_all: bool, stage: Stage
) -> None:
    """Segments whose parts do not lie one after another in the result: gathered in one message, then unpacked."""
    placed = _spans([own[1] - own[0] for _, own, _ in apart])
    sent = x
    if not is_all:
        sent = stage((*x.shape[:dim], placed[-1][1], *x.shape[dim + 1 :]), x.dtype)
        result.pack += [(_span(x, dim, own), _span(sent, dim, at)) for (_, own, _), at in zip(apart, placed)]
    received = stage((ranks, *sent.shape), x.dtype)
    result.native.append(("all_gather", sent, received, ""))
    for (segment, own, whole), at in zip(apart, placed):
        size = own[1] - own[0]
        for rank in range(0, ranks, segment.copies):
            start = whole[0] + rank // segment.copies * size
            result.unpack.append((_span(received[rank], dim, at), _span(out, dim, (start, start + size))))


def _all_to_all(
    result: Moves, attrs: Mapping[str, Any], x: Array, out: Array, ranks: int, here: int, stage: Stage
) -> bool:
    """S(concat_dim) -> S(split_dim). A message is cut at the segments of the side that needs no staging."""
    split, concat = attrs["split_dim"], attrs["concat_dim"]
    given, held = segments_of(attrs["split_segments"]), segments_of(attrs["concat_segments"])
    if split == concat or any(s.copies > 1 for s in (*given, *held)):
        return False
    sent = [ranges(given, ranks, rank) for rank in range(ranks)]
    kept = [ranges(held, ranks, rank) for rank in range(ranks)]
    own = _spans([stop - start for start, stop in kept[here]])
    mine = _spans([stop - start for start, stop in sent[here]])
    for a, at in zip(sent[here], mine):  # what stays here
        for b, part in zip(kept[here], own):
            result.pack.append((_span(_span(x, split, a), concat, part), _span(_span(out, concat, b), split, at)))
    others = [rank for rank in range(ranks) if rank != here]
    piece = list(x.shape)
    piece[split] //= ranks
    direct = _is_first(x.shape, split), _is_first(out.shape, concat)
    packed = None if direct[0] else stage((ranks - 1, *piece), x.dtype)
    for number, rank in enumerate(others):
        if packed is None:
            result.sends += [(_span(x, split, span), rank) for span in sent[rank]]
            continue
        _copy_spans(result.pack, x, packed[number], split, sent[rank])
        cuts = own if direct[1] else [(0, piece[concat])]
        result.sends += [(_span(packed[number], concat, span), rank) for span in cuts]
    received = None if direct[1] and not direct[0] else stage((ranks - 1, *piece), x.dtype)
    for number, rank in enumerate(others):
        if received is None:
            result.receives += [(_span(out, concat, span), rank) for span in kept[rank]]
            continue
        cuts = mine if direct[0] else [(0, piece[split])]
        result.receives += [(_span(received[number], split, span), rank) for span in cuts]
        for part, b in zip(own, kept[rank]):
            result.unpack.append((_span(received[number], concat, part), _span(out, concat, b)))
    return True


def _shift(result: Moves, attrs: Mapping[str, Any], x: Array, out: Array, ranks: int, here: int, stage: Stage) -> bool:
    offset = attrs["offset"]
    if offset % ranks == 0:
        result.pack.append((x, out))
    else:
        result.sends.append((x, (here + offset) % ranks))
        result.receives.append((out, (here - offset) % ranks))
    return True


def _rooted(*_: Any) -> bool:
    """Those with a root: the communicator's own."""
    return False


_KINDS: Mapping[str, Callable[..., bool]] = {
    "AllReduce": _all_reduce,
    "ReduceScatter": _reduce_scatter,
    "AllGather": _all_gather,
    "AllToAll": _all_to_all,
    "Shift": _shift,
    **dict.fromkeys(ROOTED, _rooted),
}


def _is_first(shape: Shape, dim: int) -> bool:
    """Whether a range of `dim` is one run of memory."""
    return prod(shape[:dim]) == 1


def _is_plain(segments: Segments) -> bool:
    return len(segments) == 1 and segments[0].copies == 1


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of parts of these sizes, one after another."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(end - size, end) for size, end in zip(sizes, ends)]


def _span(x: Array, dim: int, span: tuple[int, int]) -> Array:
    return x[(slice(None),) * dim + (slice(*span),)]


def _copy_spans(
    copies: list[tuple[Array, Array]], x: Array, target: Array, dim: int, spans: Sequence[tuple[int, int]]
) -> None:
    """Copies of some ranges of `dim` of x to one after another in `target`."""
    for span, at in zip(spans, _spans([stop - start for start, stop in spans])):
        copies.append((_span(x, dim, span), _span(target, dim, at)))
