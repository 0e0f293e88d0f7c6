"""Collectives with segments, on threads, against `cut` and `join`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from onnxmesh.runtime.collectives import execute
from onnxmesh.runtime.comm import Communicator, RecordingCommunicator
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Segment, Shard, cut, join
from onnxmesh.runtime.plan import Collective
from onnxmesh.runtime.threads import run_ranks

RANKS = 4
MESH = Mesh.of(tp=RANKS)
SEGMENTS = {
    "plain": (Segment(8),),
    "two": (Segment(4), Segment(12)),
    "whole": (Segment(3, 4), Segment(8)),
    "whole-between": (Segment(4), Segment(1, 4), Segment(8), Segment(2, 4)),
    "copies": (Segment(6, 2), Segment(4)),
    "only-copies": (Segment(2, 2),),
    "all-kinds": (Segment(3, 4), Segment(4), Segment(2, 2)),
}


def pairs(placement: Shard) -> list[list[int]]:
    return [[s.size, s.copies] for s in placement.segments]


def on_ranks(
    kind: str, attrs: dict[str, Any], pieces: list[np.ndarray], mesh: Mesh = MESH, axis: str = "tp"
) -> list[np.ndarray]:
    item = Collective(kind, axis, (0,), (1,), attrs)
    body: Callable[[Communicator], np.ndarray] = lambda comm: execute(item, pieces[comm.rank], comm, np)  # noqa: E731
    return run_ranks(mesh, body, timeout=20)


def whole(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(("name", "dim"), product(SEGMENTS, (0, 1)))
def test_all_gather_joins_the_pieces(name: str, dim: int) -> None:
    placement = Shard(dim, SEGMENTS[name])
    x = whole(*((placement.size, 3) if dim == 0 else (3, placement.size)))
    pieces = [cut(x, placement, RANKS, rank, np) for rank in range(RANKS)]
    for got in on_ranks("AllGather", {"dim": dim, "segments": pairs(placement)}, pieces):
        np.testing.assert_array_equal(got, x)
        np.testing.assert_array_equal(got, join(pieces, placement, np))


@pytest.mark.parametrize("reduce", ["sum", "max", "min"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_reduce_scatter_cuts_the_reduction(name: str, reduce: str) -> None:
    placement = Shard(1, SEGMENTS[name])
    values = [np.random.default_rng(rank).integers(0, 99, (3, placement.size)) for rank in range(RANKS)]
    function = {"sum": np.sum, "max": np.max, "min": np.min}[reduce]
    attrs = {"dim": 1, "segments": pairs(placement), "reduce": reduce}
    for rank, got in enumerate(on_ranks("ReduceScatter", attrs, values)):
        np.testing.assert_array_equal(got, cut(function(values, axis=0), placement, RANKS, rank, np))


@pytest.mark.parametrize(("held", "wanted"), product(SEGMENTS, SEGMENTS))
def test_all_to_all_cuts_what_it_joins(held: str, wanted: str) -> None:
    source, target = Shard(0, SEGMENTS[held]), Shard(1, SEGMENTS[wanted])
    x = whole(source.size, target.size, 2)
    pieces = [cut(x, source, RANKS, rank, np) for rank in range(RANKS)]
    attrs = {"concat_dim": 0, "concat_segments": pairs(source), "split_dim": 1, "split_segments": pairs(target)}
    for rank, got in enumerate(on_ranks("AllToAll", attrs, pieces)):
        np.testing.assert_array_equal(got, cut(x, target, RANKS, rank, np))


@pytest.mark.parametrize(("held", "wanted"), [("two", (16,)), ("copies", (4, 6))])
def test_all_to_all_on_one_dim_changes_the_segments(held: str, wanted: tuple[int, ...]) -> None:
    source = Shard(0, SEGMENTS[held])
    target = Shard(0, tuple(Segment(n, 1 if n % RANKS == 0 else 2) for n in wanted))
    x = whole(source.size, 2)
    pieces = [cut(x, source, RANKS, rank, np) for rank in range(RANKS)]
    attrs = {"concat_dim": 0, "concat_segments": pairs(source), "split_dim": 0, "split_segments": pairs(target)}
    for rank, got in enumerate(on_ranks("AllToAll", attrs, pieces)):
        np.testing.assert_array_equal(got, cut(x, target, RANKS, rank, np))


@pytest.mark.parametrize(("reduce", "want"), [("sum", 6), ("max", 3), ("min", 0)])
def test_all_reduce(reduce: str, want: int) -> None:
    pieces = [np.full((2, 3), rank, np.float32) for rank in range(RANKS)]
    for got in on_ranks("AllReduce", {"reduce": reduce}, pieces):
        np.testing.assert_array_equal(got, np.full((2, 3), want))


@pytest.mark.parametrize("root", range(RANKS))
def test_a_root_gives_and_takes(root: int) -> None:
    values = [np.random.default_rng(rank).integers(0, 9, (8, 3)) for rank in range(RANKS)]
    nothing = [np.zeros((32, 3), np.int64)] * RANKS
    gathered, summed = list(nothing), [array[:8] for array in nothing]
    gathered[root], summed[root] = np.concatenate(values), np.sum(values, axis=0)
    for kind, attrs, expected in (
        ("Broadcast", {}, [values[root]] * RANKS),
        ("ScatterFrom", {"dim": 0}, np.split(values[root], RANKS)),
        ("GatherTo", {"dim": 0}, gathered),
        ("ReduceTo", {"reduce": "sum"}, summed),
    ):
        for got, want in zip(on_ranks(kind, {**attrs, "root": root}, values), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_shift_sends_to_the_next_rank() -> None:
    got = on_ranks("Shift", {"offset": 1}, [np.array([rank]) for rank in range(RANKS)])
    assert [int(x[0]) for x in got] == [3, 0, 1, 2]


def test_an_inner_axis_is_left_alone() -> None:
    mesh, placement = Mesh.of(tp=2, cp=2), Shard(0, (Segment(4), Segment(2)))
    pieces = [cut(whole(6) + 100 * (rank % 2), placement, 2, rank // 2, np) for rank in range(4)]
    got = on_ranks("AllGather", {"dim": 0, "segments": pairs(placement)}, pieces, mesh, "cp")
    for rank, x in enumerate(got):
        np.testing.assert_array_equal(x, whole(6) + 100 * (rank % 2))


def test_segments_that_are_whole_are_not_sent() -> None:
    placement = Shard(0, (Segment(5, 4), Segment(8)))
    item = Collective("AllGather", "tp", (0,), (1,), {"dim": 0, "segments": pairs(placement)})

    def body(comm: Communicator) -> int:
        recorder = RecordingCommunicator(comm)
        execute(item, cut(whole(13), placement, RANKS, comm.rank, np), recorder, np)
        return sum(record.bytes for record in recorder.records)

    assert run_ranks(MESH, body, timeout=20) == [2 * 4] * RANKS
