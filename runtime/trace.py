"""Chrome traces: timelines of all ranks for chrome://tracing and Perfetto.

A rank is a process of the trace and a stream a thread; an instruction is one event. Arrows lead from the rank that
came last to a collective to those that waited for it. The format:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxmesh.runtime.engine import InstructionTime
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Buffer, Collective, Instruction, Program
from onnxmesh.runtime.timeline import Timeline

Event = dict[str, Any]
_STREAMS = {0: "computation", 1: "communication beside it"}


def chrome_trace(program: Program, mesh: Mesh, timelines: Sequence[Timeline]) -> dict[str, Any]:
    """The trace as JSON data; `timelines` are on one clock."""
    events = [event for rank, own in enumerate(timelines) for event in _rank(program, rank, own)]
    return {"traceEvents": [*events, *_arrows(program, mesh, timelines)], "displayTimeUnit": "ms"}


def write(path: str | Path, trace: dict[str, Any]) -> None:
    """Write a trace. Raises RunError where the file cannot be written."""
    try:
        Path(path).write_text(json.dumps(trace, separators=(",", ":")))
    except OSError as error:
        raise RunError(f"'{path}' cannot be written: {error.strerror}", code="OM5010") from error


def _rank(program: Program, rank: int, timeline: Timeline) -> Iterator[Event]:
    yield {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
    yield {"name": "process_sort_index", "ph": "M", "pid": rank, "args": {"sort_index": rank}}
    for stream in sorted({t.stream for t in timeline}):
        name = _STREAMS.get(stream, f"stream {stream}")
        yield {"name": "thread_name", "ph": "M", "pid": rank, "tid": stream, "args": {"name": name}}
    for time in timeline:
        item = program.instructions[time.index]
        yield {
            "name": f"{_kind(item)} {item.node}".strip(),
            "cat": "communication" if isinstance(item, Collective) else "compute",
            "ph": "X",
            "ts": round(time.start_us, 3),
            "dur": round(time.end_us - time.start_us, 3),
            "pid": rank,
            "tid": time.stream,
            "args": _arguments(program, time, item),
        }


def _arguments(program: Program, time: InstructionTime, item: Instruction) -> dict[str, Any]:
    ins, outs = ([program.buffers[i] for i in side if i >= 0] for side in (item.ins, item.outs))
    found: dict[str, Any] = {
        "instruction": time.index,
        "kernel": _kind(item),
        "node": item.node,
        "in": [_type(buffer) for buffer in ins],
        "out": [_type(buffer) for buffer in outs],
        "bytes": sum(buffer.nbytes for buffer in (*ins, *outs)),
    }
    if isinstance(item, Collective):
        found |= {"axis": item.axis, "reason": item.reason}
    return found


def _arrows(program: Program, mesh: Mesh, timelines: Sequence[Timeline]) -> Iterator[Event]:
    number = 0
    for index, item in enumerate(program.instructions):
        if not isinstance(item, Collective):
            continue
        for group in mesh.groups(item.axis):
            last = max(group, key=lambda rank: timelines[rank][index].start_us)
            number += 1
            for rank in (last, *(rank for rank in group if rank != last)):
                time = timelines[rank][index]
                place = time.start_us if rank == last else time.end_us
                event = {"name": "waited for", "cat": "communication", "id": number, "pid": rank, "tid": time.stream}
                yield {**event, "ph": "s" if rank == last else "f", "bp": "e", "ts": round(place, 3)}


def _kind(item: Instruction) -> str:
    return item.kind if isinstance(item, Collective) else item.kernel


def _type(buffer: Buffer) -> str:
    return f"{buffer.dtype}{list(buffer.shape)}"
