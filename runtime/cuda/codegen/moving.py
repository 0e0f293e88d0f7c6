"""Launchers of the ops that move data: each is a list of strided copies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from onnxmesh.runtime.cuda.codegen.copy import copy_views
from onnxmesh.runtime.cuda.codegen.operand import Unsuited
from onnxmesh.runtime.cuda.codegen.view import View, refined
from onnxmesh.runtime.cuda.launchers import Job, Launch, launcher
from onnxmesh.runtime.placement import ranges
from onnxmesh.runtime.segments import segments_of

Pairs = list[tuple[View | None, View]]
"""(source, destination); a source None stands for zeros."""


def copying(*ops: str) -> Callable[[Callable[[Job, list[View], list[View]], Pairs]], None]:
    """Register the launcher of ops that are copies, from a function that lists them."""

    def register(pairs: Callable[[Job, list[View], list[View]], Pairs]) -> None:
        @launcher(*ops)
        @functools.wraps(pairs)
        def launch(job: Job) -> Launch | None:
            try:
                ins, outs = [View.of(x) for x in job.ins if x is not None], [View.of(x) for x in job.outs]
                return copy_views(pairs(job, ins, outs))
            except Unsuited:
                return None

    return register


@copying("Identity", "Expand")
def _expand(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    return [(ins[0].broadcast(outs[0].shape), outs[0])]


@copying("Reshape")
def _reshape(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    return _reshaped(ins[0], outs[0])


def _reshaped(x: View, out: View) -> Pairs:
    """Copy x into `out` of another shape."""
    if 0 in x.shape:
        return []
    try:
        shape = refined(x.shape, out.shape)
    except Unsuited:
        shape = out.shape if x.is_contiguous else x.shape
    return [(x.reshaped(shape), out.reshaped(shape))]


@copying("Transpose")
def _transpose(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    order = job.attrs.get("perm") or range(len(ins[0].shape))[::-1]
    return [(ins[0].permuted(order), outs[0])]


@copying("Slice")
def _slice(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    x, out = ins[0], outs[0]
    for axis, start, step in zip(job.attrs["axes"], job.attrs["starts"], job.attrs["steps"]):
        x = x.cut(axis, start, out.shape[axis], step)
    return [(x, out)]


@copying("Split")
def _split(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    axis = job.attrs.get("axis", 0) % len(ins[0].shape)
    return [(ins[0].cut(axis, start, out.shape[axis]), out) for start, out in _places(axis, outs)]


@copying("Concat")
def _concat(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    axis = job.attrs["axis"] % len(outs[0].shape)
    return [(x, outs[0].cut(axis, start, x.shape[axis])) for start, x in _places(axis, ins)]


def _places(axis: int, views: Sequence[View]) -> list[tuple[int, View]]:
    """Each view with where it begins along the axis, one after another."""
    starts = [sum(view.shape[axis] for view in views[:i]) for i in range(len(views))]
    return list(zip(starts, views))


@copying("Shard")
def _shard(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    dim, segments = job.attrs["dim"], segments_of(job.attrs["segments"])
    held, local = sum(s.size * s.copies for s in segments), outs[0].shape[dim]
    if not local or held % local:
        raise Unsuited("segments that do not give the output")
    pairs: Pairs = []
    at = 0
    for start, stop in ranges(segments, held // local, job.coordinate[job.attrs["axis"]]):
        pairs.append((ins[0].cut(dim, start, stop - start), outs[0].cut(dim, at, stop - start)))
        at += stop - start
    return pairs


@copying("Tile")
def _tile(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    x, repeats = ins[0], job.attrs["repeats"]
    if 0 in outs[0].shape:
        return []
    shape = tuple(n for pair in zip(repeats, x.shape) for n in pair)
    strides = tuple(n for stride in x.strides for n in (0, stride))
    return [(View(x.itemsize, shape, strides, x.address), outs[0].reshaped(shape))]


@copying("Pad")
def _pad(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    """The padding of a dim is written over what the dims after it leave."""
    x, rest, pads = ins[0], outs[0], job.attrs["pads"]
    if job.attrs.get("mode", "constant") != "constant":
        raise Unsuited("padding with other values than one")
    value = None if len(ins) == 1 else View(x.itemsize, (), (), ins[1].address)
    pairs: Pairs = []
    for dim in range(len(x.shape)):
        before, after = pads[dim], pads[dim + len(x.shape)]
        x = x.cut(dim, max(0, -before), max(0, x.shape[dim] + min(0, before) + min(0, after)))
        before, after, count = max(0, before), max(0, after), x.shape[dim]
        for edge in (rest.cut(dim, 0, before), rest.cut(dim, before + count, after)):
            pairs.append((None if value is None else value.broadcast(edge.shape), edge))
        rest = rest.cut(dim, before, count)
    return [*pairs, (x, rest)]


@copying("DepthToSpace", "SpaceToDepth")
def _blocks(job: Job, ins: list[View], outs: list[View]) -> Pairs:
    (n, c, h, w), k = ins[0].shape, job.attrs["blocksize"]
    if job.kernel == "SpaceToDepth":
        crd = job.attrs.get("mode", "DCR") == "CRD"
        shape, order = (n, c, h // k, k, w // k, k), (0, 1, 3, 5, 2, 4) if crd else (0, 3, 5, 1, 2, 4)
    elif job.attrs.get("mode", "DCR") == "DCR":
        shape, order = (n, k, k, c // k**2, h, w), (0, 3, 4, 1, 5, 2)
    else:
        shape, order = (n, c // k**2, k, k, h, w), (0, 1, 4, 2, 5, 3)
    if not math.prod(shape):
        return []
    x = ins[0].reshaped(shape).permuted(order)
    return [(x, outs[0].reshaped(x.shape))]
