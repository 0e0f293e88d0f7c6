"""Runs a plan's collectives over a communicator.

Communicators know the plain cut of a dim only. Where a placement has segments, the pieces are put in the order of
the ranks before sending, or in the order of the segments after receiving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.placement import Segments, Shard, cut, join, ranges
from onnxmesh.runtime.plan import Collective
from onnxmesh.runtime.segments import segments_of


def execute(item: Collective, x: Array, comm: Communicator, xp: Any, number: int = 0) -> Array:
    """The result of `item` for this rank's `x`, its input `number`.

    Raises the communicator's errors, and ValueError where the attributes do not fit `x`.
    """
    return _KINDS[item.kind](item.axis, item.attrs_of(number), x, comm, xp)


def all_gather(x: Array, axis: str, placement: Shard, comm: Communicator, xp: Any) -> Array:
    """The tensor that is whole on `axis`, from the pieces: `join` of all ranks' x.

    Segments that every rank holds whole are not sent.
    """
    ranks, dim = comm.mesh.axis_size(axis), placement.dim
    sent = tuple(s for s in placement.segments if s.copies < ranks)
    if len(sent) == len(placement.segments):
        return join(xp.split(comm.all_gather(x, axis, dim), ranks, axis=dim), placement, xp)
    local = _split(x, [s.local(ranks) for s in placement.segments], dim, xp)
    pieces = {i: piece for i, (s, piece) in enumerate(zip(placement.segments, local)) if s.copies < ranks}
    if pieces:
        together = xp.concatenate(list(pieces.values()), axis=dim)
        whole = all_gather(together, axis, Shard(dim, sent), comm, xp)
        pieces = dict(zip(pieces, _split(whole, [s.size for s in sent], dim, xp)))
    return xp.concatenate([pieces.get(i, piece) for i, piece in enumerate(local)], axis=dim)


def _all_reduce(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    return comm.all_reduce(x, axis, attrs.get("reduce", "sum"))


def _reduce_scatter(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    dim, segments = attrs["dim"], segments_of(attrs["segments"])
    x = _by_rank(x, dim, segments, comm.mesh.axis_size(axis), xp)
    return comm.reduce_scatter(x, axis, attrs.get("reduce", "sum"), dim)


def _all_gather(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    return all_gather(x, axis, Shard(attrs["dim"], segments_of(attrs["segments"])), comm, xp)


def _all_to_all(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    """S(concat_dim) -> S(split_dim); on one dim, from one segmentation to another."""
    ranks = comm.mesh.axis_size(axis)
    held = Shard(attrs["concat_dim"], segments_of(attrs["concat_segments"]))
    wanted = Shard(attrs["split_dim"], segments_of(attrs["split_segments"]))
    if held.dim == wanted.dim:
        whole = all_gather(x, axis, held, comm, xp)
        return cut(whole, wanted, ranks, comm.mesh.coordinate(comm.rank)[axis], xp)
    x = _by_rank(x, wanted.dim, wanted.segments, ranks, xp)
    received = comm.all_to_all(x, axis, wanted.dim, held.dim)
    return join(xp.split(received, ranks, axis=held.dim), held, xp)


def _shift(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    return comm.shift(x, axis, attrs["offset"])


def _broadcast(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    return comm.broadcast(x, axis, attrs["root"])


def _reduce(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    """The reduction on the root, zeros elsewhere."""
    result = comm.reduce(x, axis, attrs.get("reduce", "sum"), attrs["root"])
    return xp.zeros_like(x) if result is None else result


def _gather(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    """All ranks' pieces one after another on the root, zeros elsewhere."""
    dim = attrs["dim"]
    result = comm.gather(x, axis, attrs["root"], dim)
    if result is not None:
        return result
    return xp.zeros((*x.shape[:dim], x.shape[dim] * comm.mesh.axis_size(axis), *x.shape[dim + 1 :]), x.dtype)


def _scatter(axis: str, attrs: Mapping[str, Any], x: Array, comm: Communicator, xp: Any) -> Array:
    """This rank's part of the root's x."""
    ranks, dim, root = comm.mesh.axis_size(axis), attrs["dim"], attrs["root"]
    piece = x[(slice(None),) * dim + (slice(0, x.shape[dim] // ranks),)]
    here = comm.mesh.coordinate(comm.rank)[axis] == root
    return comm.scatter(x if here else None, axis, root, dim, piece)


_KINDS: Mapping[str, Callable[[str, Mapping[str, Any], Array, Communicator, Any], Array]] = {
    "AllReduce": _all_reduce,
    "ReduceScatter": _reduce_scatter,
    "AllGather": _all_gather,
    "AllToAll": _all_to_all,
    "Shift": _shift,
    "Broadcast": _broadcast,
    "ReduceTo": _reduce,
    "GatherTo": _gather,
    "ScatterFrom": _scatter,
}


def _by_rank(x: Array, dim: int, segments: Segments, ranks: int, xp: Any) -> Array:
    """x with the pieces of `dim` in the order of the ranks: its plain cut is then the cut by segments."""
    if len(segments) == 1 and segments[0].copies == 1:
        return x
    spans = [span for rank in range(ranks) for span in ranges(segments, ranks, rank)]
    return xp.concatenate([x[(slice(None),) * dim + (slice(*span),)] for span in spans], axis=dim)


def _split(x: Array, sizes: list[int], dim: int, xp: Any) -> list[Array]:
    """x taken apart along `dim` into pieces of `sizes`."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return list(xp.split(x, ends, axis=dim))
