"""Placements: where the pieces of a tensor live along one mesh axis.

A tensor has one placement per mesh axis. Axes apply in the order dp, cp, tp: the placement on a later axis
speaks of the tensor that the earlier axes left local.

- `Replicate` (R): every rank of the axis holds all of it.
- `Partial(op)` (P): the value is the sum (or max, min) over the ranks.
- `Shard(dim, segments)` (S): `segments` are the consecutive pieces of `dim`. Each segment is cut into
  `ranks // copies` equal parts, and `copies` consecutive ranks hold each part; the local tensor is the
  concatenation of a rank's parts in the order of the segments. `copies == 1` is the plain cut,
  `copies == ranks` a segment that every rank holds whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True, slots=True)
class Segment:
    """A piece of a dim: its global size, and how many consecutive ranks hold each part of it."""

    size: int
    copies: int = 1

    def parts(self, ranks: int) -> int:
        """Number of distinct parts among `ranks` ranks."""
        return ranks // self.copies

    def local(self, ranks: int) -> int:
        """Size of one rank's part."""
        return self.size * self.copies // ranks

    def fits(self, ranks: int) -> bool:
        """Whether the segment can be cut among `ranks` ranks."""
        return ranks % self.copies == 0 and self.size > 0 and self.size % (ranks // self.copies) == 0

    def text(self, ranks: int) -> str:
        """`512`, `512*` (whole on every rank) or `512~2` (each part on 2 ranks)."""
        if self.copies == 1:
            return str(self.size)
        return f"{self.size}*" if self.copies == ranks else f"{self.size}~{self.copies}"


Segments = tuple[Segment, ...]


@dataclass(frozen=True, order=True, slots=True)
class Replicate:
    """Every rank of the axis holds all of the tensor."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, order=True, slots=True)
class Partial:
    """The value is the reduction over the ranks. A constant that is Partial: rank 0 holds it,
    the others the identity."""

    op: str = "sum"

    def __str__(self) -> str:
        return "P" if self.op == "sum" else f"P({self.op})"


@dataclass(frozen=True, order=True, slots=True)
class Shard:
    """Every rank holds its parts of the segments of `dim`.

    `once` is for constants that a sum consumes: of the ranks that hold the same part only the first has its
    values, the others have zeros, so that nothing counts twice.
    """

    dim: int
    segments: Segments
    once: bool = False

    @staticmethod
    def plain(dim: int, size: int) -> Shard:
        """The cut of the whole dim into equal parts."""
        return Shard(dim, (Segment(size),))

    @property
    def size(self) -> int:
        """Global size of the dim."""
        return sum(s.size for s in self.segments)

    def local(self, ranks: int) -> int:
        """Size of the dim on one rank."""
        return sum(s.local(ranks) for s in self.segments)

    def fits(self, ranks: int) -> bool:
        """Whether every segment can be cut, and at least one really is."""
        return all(s.fits(ranks) for s in self.segments) and any(s.copies < ranks for s in self.segments)

    @property
    def has_copies(self) -> bool:
        """Whether some part is held by more than one rank."""
        return any(s.copies > 1 for s in self.segments)

    def moved(self, dim: int) -> Shard:
        """The same segments on another dim."""
        return Shard(dim, self.segments, self.once)

    def text(self, ranks: int) -> str:
        """`S(1)`, or `S(1; 512,4096*)` where there are several segments."""
        once = "!" if self.once else ""
        if len(self.segments) == 1 and self.segments[0].copies == 1:
            return f"S({self.dim}{once})"
        return f"S({self.dim}{once}; {','.join(s.text(ranks) for s in self.segments)})"

    def __str__(self) -> str:
        return self.text(0)


Placement = Replicate | Partial | Shard
R = Replicate()


def text(placement: Placement, ranks: int) -> str:
    """The placement as people read it."""
    return placement.text(ranks) if isinstance(placement, Shard) else str(placement)


def local_shape(shape: Sequence[int], placement: Placement, ranks: int) -> tuple[int, ...]:
    """Shape of one rank's piece of a tensor of `shape`."""
    result = list(shape)
    if isinstance(placement, Shard):
        result[placement.dim] = placement.local(ranks)
    return tuple(result)


def ranges(segments: Segments, ranks: int, index: int) -> list[tuple[int, int]]:
    """The (start, stop) ranges of the global dim that rank `index` holds, in local order."""
    result, start = [], 0
    for segment in segments:
        size = segment.local(ranks)
        first = start + index // segment.copies * size
        result.append((first, first + size))
        start += segment.size
    return result


def cut(array: Any, placement: Placement, ranks: int, index: int, xp: Any) -> Any:
    """Rank `index`'s piece of the global `array` (a view where it can be)."""
    if isinstance(placement, Replicate):
        return array
    if isinstance(placement, Partial):
        return array if index == 0 else _identity_like(array, placement.op, xp)
    pieces = []
    for segment, (start, stop) in zip(placement.segments, ranges(placement.segments, ranks, index)):
        piece = array[(slice(None),) * placement.dim + (slice(start, stop),)]
        zero = placement.once and index % segment.copies != 0
        pieces.append(xp.zeros_like(piece) if zero else piece)
    return pieces[0] if len(pieces) == 1 else xp.concatenate(pieces, axis=placement.dim)


def join(pieces: Sequence[Any], placement: Placement, xp: Any) -> Any:
    """The global tensor from the pieces of all ranks: the inverse of `cut`."""
    ranks = len(pieces)
    if isinstance(placement, Replicate):
        return pieces[0]
    if isinstance(placement, Partial):
        return _reduce(pieces, placement.op, xp)
    parts, offset = [], 0
    for segment in placement.segments:
        size = segment.local(ranks)
        at = (slice(None),) * placement.dim + (slice(offset, offset + size),)
        parts += [pieces[rank][at] for rank in range(0, ranks, segment.copies)]
        offset += size
    return xp.concatenate(parts, axis=placement.dim)


def _identity_like(array: Any, op: str, xp: Any) -> Any:
    if op == "sum":
        return xp.zeros_like(array)
    if array.dtype.kind == "b":
        return xp.full_like(array, op == "min")
    if array.dtype.kind in "iu":
        limits = xp.iinfo(array.dtype)
        return xp.full_like(array, limits.min if op == "max" else limits.max)
    return xp.full_like(array, -float("inf") if op == "max" else float("inf"))


def _reduce(pieces: Sequence[Any], op: str, xp: Any) -> Any:
    function = {"sum": xp.add, "max": xp.maximum, "min": xp.minimum}[op]
    result = pieces[0]
    for piece in pieces[1:]:
        result = function(result, piece)
    return result


def to_json(placement: Placement) -> Any:
    """The placement as JSON data."""
    if isinstance(placement, Replicate):
        return "R"
    if isinstance(placement, Partial):
        return {"partial": placement.op}
    data: dict[str, Any] = {"dim": placement.dim, "segments": [[s.size, s.copies] for s in placement.segments]}
    return {**data, "once": True} if placement.once else data


def from_json(data: Any) -> Placement:
    """The placement that `to_json` wrote. Raises ValueError where `data` is something else."""
    if data == "R":
        return R
    if isinstance(data, dict) and set(data) == {"partial"} and data["partial"] in ("sum", "max", "min"):
        return Partial(data["partial"])
    try:
        segments = tuple(Segment(int(size), int(copies)) for size, copies in data["segments"])
        return Shard(int(data["dim"]), segments, bool(data.get("once", False)))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"not a placement: {data!r}") from error
