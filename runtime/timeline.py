"""Measured timelines of all ranks: on one clock, and what their time went to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from onnxmesh.runtime.engine import InstructionTime
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Collective, Program

Timeline = list[InstructionTime]
"""The instructions of one rank's run, in the order of the program."""


@dataclass(frozen=True)
class Shares:
    """What one rank's time went to, in microseconds.

    Attributes:
        compute: kernels.
        communication: collectives, from the moment that the last rank of the group has arrived.
        waiting: for the last rank of the group to arrive at a collective.
        beside: how much of communication and waiting ran beside kernels.
        idle: neither a kernel nor a collective was under way.
        total: from the first start to the last end.
    """

    compute: float
    communication: float
    waiting: float
    beside: float
    idle: float
    total: float


def to_json(timeline: Sequence[InstructionTime]) -> list[list[float]]:
    """As lists [index, start, end, stream], for another process."""
    return [[t.index, t.start_us, t.end_us, t.stream] for t in timeline]


def from_json(value: Any) -> Timeline:
    """What `to_json` made."""
    return [InstructionTime(int(index), start, end, int(stream)) for index, start, end, stream in value]


def aligned(timelines: Sequence[Timeline], program: Program) -> list[Timeline]:
    """All ranks on rank 0's clock, which then starts at 0.

    Ranks leave a collective together, so the median difference of its ends is that of the clocks. Where a rank's
    median times overlap on one stream, the later instruction starts when the earlier one ends.
    """
    ends = [{t.index: t.end_us for t in own} for own in timelines]
    common = [i for i, item in enumerate(program.instructions) if isinstance(item, Collective)]
    shifts = [median(ends[0][i] - own[i] for i in common) if common else 0.0 for own in ends]
    first = min((t.start_us + by for own, by in zip(timelines, shifts) for t in own), default=0.0)
    return [_in_order(own, by - first) for own, by in zip(timelines, shifts)]


def _in_order(timeline: Timeline, by: float) -> Timeline:
    result: Timeline = []
    free: dict[int, float] = {}
    for t in sorted(timeline, key=lambda t: (t.start_us, t.index)):
        start = max(t.start_us + by, free.get(t.stream, 0.0))
        end = max(t.end_us + by, start)
        free[t.stream] = end
        result.append(replace(t, start_us=start, end_us=end))
    return sorted(result, key=lambda t: t.index)


def waits(timelines: Sequence[Timeline], program: Program, mesh: Mesh) -> list[dict[int, float]]:
    """For every rank and collective how long it waited for others: its duration less the shortest in its group."""
    result: list[dict[int, float]] = [{} for _ in timelines]
    for index, item in enumerate(program.instructions):
        if not isinstance(item, Collective):
            continue
        took = [own[index].end_us - own[index].start_us for own in timelines]
        for rank in range(len(timelines)):
            result[rank][index] = took[rank] - min(took[other] for other in mesh.group(rank, item.axis))
    return result


def shares(timelines: Sequence[Timeline], program: Program, mesh: Mesh) -> list[Shares]:
    """What the time of every rank went to."""
    waited = waits(timelines, program, mesh)
    return [_shares(own, program, sum(waited[rank].values())) for rank, own in enumerate(timelines)]


def _shares(timeline: Timeline, program: Program, waiting: float) -> Shares:
    sends = [isinstance(item, Collective) for item in program.instructions]
    kernels = _joined([(t.start_us, t.end_us) for t in timeline if not sends[t.index]])
    collectives = _joined([(t.start_us, t.end_us) for t in timeline if sends[t.index]])
    busy = _joined(kernels + collectives)
    total = busy[-1][1] - busy[0][0] if busy else 0.0
    sent = sum(t.end_us - t.start_us for t in timeline if sends[t.index])
    return Shares(
        compute=sum(t.end_us - t.start_us for t in timeline if not sends[t.index]),
        communication=sent - waiting,
        waiting=waiting,
        beside=_length(kernels) + _length(collectives) - _length(busy),
        idle=total - _length(busy),
        total=total,
    )


def _joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that do not touch, in order, over the same times."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)
