"""Timelines on one clock, what their time went to, and Chrome traces of them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_session import MODEL, plan

from onnxmesh.runtime import timeline, trace
from onnxmesh.runtime.bench_rank import Work
from onnxmesh.runtime.engine import InstructionTime
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Buffer, Collective, Instruction, Launch, Program
from onnxmesh.runtime.session import Session
from onnxmesh.runtime.timeline import Timeline

BUFFER = Buffer("float32", (4, 2), "arena")
TWO = Mesh.of(tp=2)


def program(*items: Instruction) -> Program:
    return Program({}, (), (), (BUFFER,), items, 64)


def launch(node: str) -> Launch:
    return Launch("Add", (0, 0), (0,), node=node)


def send(node: str, stream: int = 0) -> Collective:
    return Collective("AllReduce", "tp", (0,), (0,), node=node, reason="P -> R", stream=stream)


def times(*spans: tuple[float, float], streams: tuple[int, ...] = ()) -> Timeline:
    return [InstructionTime(i, a, b, streams[i] if streams else 0) for i, (a, b) in enumerate(spans)]


SERIAL = program(launch("a"), send("b"), launch("c"))
EARLY = times((0, 10), (10, 30), (30, 40))
LATE = times((0, 22), (22, 30), (30, 44))
"""Rank 1 computes for longer, and rank 0 waits for it at the collective."""


# --- clocks ---------------------------------------------------------------------------------------------------


def test_ranks_come_on_one_clock_by_the_ends_of_their_collectives() -> None:
    other = [InstructionTime(t.index, t.start_us + 500, t.end_us + 500) for t in LATE]
    assert timeline.aligned([EARLY, other], SERIAL) == [EARLY, LATE]


def test_a_timeline_starts_at_nought() -> None:
    (only,) = timeline.aligned([times((100, 110), (110, 130), (130, 140))], SERIAL)
    assert only == EARLY


def test_medians_that_overlap_are_put_in_order() -> None:
    (only,) = timeline.aligned([times((0, 10), (9, 30), (30, 40))], SERIAL)
    assert only == EARLY


def test_a_timeline_survives_its_json() -> None:
    assert timeline.from_json(json.loads(json.dumps(timeline.to_json(EARLY)))) == EARLY


# --- shares ---------------------------------------------------------------------------------------------------


def test_waiting_is_what_a_collective_takes_beyond_the_last_that_comes() -> None:
    first, second = timeline.shares([EARLY, LATE], SERIAL, TWO)
    assert (first.compute, first.communication, first.waiting, first.total) == (20, 8, 12, 40)
    assert (second.compute, second.communication, second.waiting, second.total) == (36, 8, 0, 44)
    assert first.idle == second.idle == first.beside == 0


def test_what_runs_beside_kernels_is_told() -> None:
    items = program(send("k", stream=1), launch("a"), launch("b"))
    (own,) = timeline.shares([times((0, 30), (0, 20), (40, 50), streams=(1, 0, 0))], items, Mesh.of())
    assert (own.compute, own.communication, own.beside, own.idle, own.total) == (30, 30, 20, 10, 50)


def test_groups_wait_for_their_own_ranks_only() -> None:
    mesh = Mesh.of(tp=2, dp=2)
    waits = timeline.waits([EARLY, LATE, EARLY, EARLY], SERIAL, mesh)
    assert [own[1] for own in waits] == [12, 0, 0, 0]


# --- traces ---------------------------------------------------------------------------------------------------


def slices(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in found["traceEvents"] if event["ph"] == "X"]


def check(found: dict[str, Any], items: int, ranks: int) -> None:
    """Every instruction of every rank is there once, and nothing overlaps within a thread."""
    json.dumps(found)
    assert Counter((e["pid"], e["args"]["instruction"]) for e in slices(found)) == Counter(
        (rank, item) for rank in range(ranks) for item in range(items)
    )
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in slices(found):
        threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        spans.sort()
        assert all(end <= start + 0.002 for (_, end), (start, _) in pairwise(spans))


def test_a_trace_names_ranks_streams_nodes_and_shapes() -> None:
    found = trace.chrome_trace(SERIAL, TWO, [EARLY, LATE])
    check(found, items=3, ranks=2)
    names = [e["args"]["name"] for e in found["traceEvents"] if e["name"] == "process_name"]
    assert names == ["rank 0", "rank 1"]
    event = slices(found)[1]
    assert (event["name"], event["cat"], event["ts"], event["dur"]) == ("AllReduce b", "communication", 10, 20)
    assert event["args"]["in"] == ["float32[4, 2]"]
    assert event["args"]["bytes"] == 64
    assert (event["args"]["axis"], event["args"]["reason"]) == ("tp", "P -> R")


def test_arrows_lead_from_the_rank_that_came_last_to_those_that_waited() -> None:
    found = trace.chrome_trace(SERIAL, TWO, [EARLY, LATE])
    arrows = [e for e in found["traceEvents"] if e["ph"] in "sf"]
    assert [(e["ph"], e["pid"], e["ts"]) for e in arrows] == [("s", 1, 22), ("f", 0, 30)]
    assert len({e["id"] for e in arrows}) == 1


@pytest.mark.parametrize("mesh", [Mesh.of(), Mesh.of(tp=2), Mesh.of(tp=2, cp=2)], ids=str)
def test_a_session_gives_a_trace_of_all_its_ranks(mesh: Mesh, tmp_path: Path) -> None:
    with Session(plan(mesh), weights=MODEL.__getitem__) as session:
        found = session.measure(Work(runs=2, warmup=1).to_json())
        items = session.plan.programs[0]
    lines = timeline.aligned([timeline.from_json(found[rank]["timeline"]) for rank in range(mesh.size)], items)
    trace.write(tmp_path / "t.json", trace.chrome_trace(items, mesh, lines))
    check(json.loads((tmp_path / "t.json").read_text()), len(items.instructions), mesh.size)


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        trace.write(tmp_path / "nowhere" / "t.json", {})
