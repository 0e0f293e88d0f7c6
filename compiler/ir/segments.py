"""The algebra of segments: how the cut of one dim becomes the cut of another.

A *cut* is a tuple of segments (runtime/placement.py). Two cuts of a dim are compatible only when they are equal;
there is no coarsening: `(n,)` and `(a, b)` give a rank different elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, prod

from onnxmesh.runtime.placement import Segment, Segments


def fits(cut: Segments, ranks: int) -> bool:
    """Whether every segment divides, and at least one is not whole on every rank."""
    return all(s.fits(ranks) for s in cut) and any(s.copies < ranks for s in cut)


def whole(size: int, ranks: int) -> Segments:
    """The cut that leaves the dim whole on every rank."""
    return (Segment(size, ranks),)


def is_whole(cut: Segments, ranks: int) -> bool:
    """Whether no segment is cut: then the tensor is replicated."""
    return all(s.copies == ranks for s in cut)


def natural(size: int, ranks: int) -> list[Segments]:
    """The cuts a dim has by itself, best first.

    One equal part a rank where the size divides. Else `copies` of fewer parts (6 on 4: 2 parts of 3, each on two
    ranks), and the largest part that divides with the remainder whole (13 on 4: 12 and 1 whole).
    """
    if size < 2:
        return []
    if size % ranks == 0:
        return [(Segment(size),)]
    cuts: list[Segments] = []
    common = gcd(size, ranks)
    if common > 1:
        cuts.append((Segment(size, ranks // common),))
    rest = size % ranks
    if rest < size:
        cuts.append((Segment(size - rest), Segment(rest, ranks)))
    return cuts


def concat(parts: Sequence[Segments]) -> Segments:
    """The cut of a concatenation."""
    return tuple(segment for part in parts for segment in part)


def split(cut: Segments, sizes: Sequence[int]) -> list[Segments] | None:
    """The cuts of consecutive pieces of `sizes`; None where a boundary falls inside a segment."""
    pieces: list[Segments] = []
    rest = list(cut)
    for size in sizes:
        piece: list[Segment] = []
        while size > 0 and rest:
            segment = rest.pop(0)
            piece.append(segment)
            size -= segment.size
        if size != 0:
            return None
        pieces.append(tuple(piece))
    return pieces if not rest else None


def groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The smallest runs of dims of two shapes of one size that hold the same elements."""
    left = [prod(before[:i]) for i in range(len(before) + 1)]
    right = [prod(after[:i]) for i in range(len(after) + 1)]
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        if i < len(before):
            i += 1
        if j < len(after):
            j += 1
        while left[i] != right[j]:
            if left[i] < right[j]:
                i += 1
            else:
                j += 1
        yield range(first_i, i), range(first_j, j)


def reshape(
    before: Sequence[int], after: Sequence[int], dim: int, cut: Segments, ranks: int
) -> tuple[int, Segments] | None:
    """The (dim, cut) of `after` that holds the same elements as `cut` of dim `dim` of `before`.

    Within a group of dims, a cut of a dim with outer product O and inner product I has the flat form
    `(segments * I) repeated O times`; two dims match when their flat forms do.
    """
    if 0 in before:
        return None
    for ours, theirs in groups(before, after):
        if dim not in ours:
            continue
        outer = prod(before[ours.start : dim])
        inner = prod(before[dim + 1 : ours.stop])
        flat = tuple(Segment(s.size * inner, s.copies) for s in cut) * outer
        for target in theirs:
            if after[target] > 1:
                found = _from_flat(flat, prod(after[theirs.start : target]), prod(after[target + 1 : theirs.stop]))
                if found is not None and fits(found, ranks) and sum(s.size for s in found) == after[target]:
                    return target, found
    return None


def _from_flat(flat: Segments, outer: int, inner: int) -> Segments | None:
    """The cut whose flat form is `flat`; None where there is none."""
    if len(flat) % outer:
        return None
    period = flat[: len(flat) // outer]
    if period * outer != flat or any(s.size % inner for s in period):
        return None
    return tuple(Segment(s.size // inner, s.copies) for s in period)


def scaled(cut: Segments, ranks: int, given: int, other: int) -> Segments | None:
    """The cut of a dim that has `other` entries for every `given` of this one; None where such a run would be torn."""
    if any(s.local(ranks) % given for s in cut):
        return None
    return tuple(Segment(s.size // given * other, s.copies) for s in cut)


def kv_heads(cut: Segments, group: int, ranks: int) -> Segments | None:
    """The cut of the key and value heads for a cut of the query heads, `group` query heads to a kv head.

    Where a segment has fewer kv heads than parts, several ranks hold the same kv head. None where a rank would
    need unequal groups, since one kernel call has one group size.
    """
    result, offset, ratios = [], 0, set()
    for segment in cut:
        parts = segment.parts(ranks)
        if segment.size % group or offset % group:
            return None
        heads = segment.size // group
        if heads % parts == 0:
            result.append(Segment(heads, segment.copies))
        elif parts % heads == 0:
            result.append(Segment(heads, ranks // heads))
        else:
            return None
        ratios.add((segment.local(ranks), result[-1].local(ranks)))
        offset += segment.size
    uniform = len({q / kv for q, kv in ratios}) == 1 and all(q % kv == 0 for q, kv in ratios)
    return tuple(result) if uniform else None


def through(cut: Segments, first: Segments, ranks: int, *, gather: bool) -> Segments | None:
    """How a cut on another axis passes a collective that gathers (or scatters) `first` over `ranks`.

    Local segment i of the first axis has a tuple of its own; in the gathered dim the tuple is repeated once for
    each part. `gather=False` is the way back.
    """
    sizes = [s.local(ranks) if gather else s.size for s in first]
    pieces = split(cut, sizes)
    if pieces is None:
        return None
    if gather:
        return concat([piece * s.parts(ranks) for piece, s in zip(pieces, first)])
    result: list[Segment] = []
    for piece, segment in zip(pieces, first):
        parts = segment.parts(ranks)
        if len(piece) % parts:
            return None
        period = piece[: len(piece) // parts]
        if period * parts != piece:
            return None
        result += period
    return tuple(result)
