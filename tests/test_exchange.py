"""The moves of a collective, played for all ranks on NumPy arrays, give what the collective gives."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from onnxmesh.runtime.collectives import execute
from onnxmesh.runtime.exchange import Moves, moves, pulls, pushes, staged, staging_bytes
from onnxmesh.runtime.memory import aligned
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Segment, Shard, cut
from onnxmesh.runtime.plan import Buffer, Collective
from onnxmesh.runtime.threads import run_ranks

RANKS = 4
PLAIN, MIXED = (Segment(16),), (Segment(8), Segment(16))


def _attrs(segments):
    return [[s.size, s.copies] for s in segments]


def _gather(dim, segments):
    return "AllGather", {"dim": dim, "segments": _attrs(segments)}, Shard(dim, segments), None


def _scatter(dim, segments):
    return "ReduceScatter", {"dim": dim, "segments": _attrs(segments), "reduce": "sum"}, None, Shard(dim, segments)


def _exchange(split, given, concat, held):
    attrs = {
        "split_dim": split,
        "split_segments": _attrs(given),
        "concat_dim": concat,
        "concat_segments": _attrs(held),
    }
    return "AllToAll", attrs, Shard(concat, held), Shard(split, given)


def cases(ranks):
    """(kind, attributes, placement before, placement after) of collectives on an axis of so many ranks."""
    segments = [PLAIN, MIXED, (Segment(4, ranks), Segment(8))]
    segments += [(Segment(8, 2), Segment(16))] if ranks > 2 else []
    return [
        *[_gather(dim, each) for dim in (0, 1, 2) for each in segments],
        *[_scatter(dim, each) for dim in (0, 1, 2) for each in (PLAIN, MIXED)],
        *[
            _exchange(s, given, c, held)
            for s, c in ((1, 2), (2, 1), (0, 1), (2, 0))
            for given in (PLAIN, MIXED)
            for held in (PLAIN, MIXED)
        ],
        ("Shift", {"offset": 1}, None, None),
        ("Shift", {"offset": ranks}, None, None),
        ("AllReduce", {"reduce": "sum"}, None, None),
    ]


def samples(held, given, batch, ranks):
    """Every rank's piece of a tensor of whole numbers; ranks that hold the same part have the same."""
    whole = [batch if dim == 0 else 12 for dim in range(3)]
    for placement in (held, given):
        if placement is not None:
            whole[placement.dim] = placement.size
    rng = np.random.default_rng(0)
    if held is None:
        return [rng.integers(0, 50, whole).astype(np.float64) for _ in range(ranks)]
    x = rng.integers(0, 50, whole).astype(np.float64)
    return [np.ascontiguousarray(cut(x, held, ranks, rank, np)) for rank in range(ranks)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("kind", "attrs", "held", "given"), cases(RANKS))
def test_moves_do_what_the_collective_does(kind, attrs, held, given, batch):
    item = Collective(kind, "tp", (0,), (1,), attrs)
    given_arrays = samples(held, given, batch, RANKS)
    expected = run_ranks(Mesh.of(tp=RANKS), lambda comm: execute(item, given_arrays[comm.rank], comm, np))

    size = [0]
    packs, unpacks = staged(kind, attrs, given_arrays[0].shape, expected[0].shape)
    given_arrays = [_apart(x) if packs else x for x in given_arrays]
    results = [_apart(np.full_like(x, np.nan)) if unpacks else np.full_like(x, np.nan) for x in expected]
    played = [_moves(item, given_arrays[r], results[r], r, size) for r in range(RANKS)]
    assert all(played)
    _play([each for each in played if each is not None])

    for result, right in zip(results, expected):
        np.testing.assert_array_equal(result, right)
    buffers = [Buffer("float64", x.shape, "arena") for x in (given_arrays[0], expected[0])]
    assert staging_bytes(item, buffers, RANKS) == size[0] // RANKS


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("kind", "attrs", "held", "given"), cases(RANKS))
def test_what_ranks_push_into_each_other_fills_the_results_once(kind, attrs, held, given, batch):
    item = Collective(kind, "tp", (0,), (1,), attrs)
    pieces = samples(held, given, batch, RANKS)
    expected = run_ranks(Mesh.of(tp=RANKS), lambda comm: execute(item, pieces[comm.rank], comm, np))
    results = [_apart(np.full_like(x, np.nan)) for x in expected]
    written = [np.zeros(x.shape, int) for x in expected]
    for rank in range(RANKS):
        if kind == "ReduceScatter":
            for number, (source, target) in enumerate(pulls(item, 0, pieces[rank], results[rank], RANKS, rank)):
                parts = [pulls(item, 0, x, results[rank], RANKS, rank)[number][0] for x in pieces]
                assert source is not None
                target[...] = sum(parts)
            continue
        copies = pushes(item, 0, pieces[rank], results, RANKS, rank)
        counted = pushes(item, 0, pieces[rank], written, RANKS, rank)
        if copies is None or counted is None:
            pytest.skip("not made of copies")
        for (_, source, target), (_, _, counts) in zip(copies, counted):
            target[...] = source
            counts += 1
    for result, right, counts in zip(results, expected, written):
        np.testing.assert_array_equal(result, right)
        assert kind == "ReduceScatter" or (counts == 1).all()


def _apart(x):
    """The same in memory that has gaps between the rows."""
    wide = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def _moves(item, x, out, rank, size) -> Moves | None:
    def stage(shape, dtype):
        size[0] += aligned(int(np.prod(shape)) * 8)
        return np.full(shape, np.nan, dtype)

    return moves(item, [x], [out], RANKS, rank, stage)


def _play(ranks: list[Moves]) -> None:
    """All ranks' moves, step by step. What is sent lies in one run of memory on both sides."""
    for each in ranks:
        for source, target in each.pack:
            target[...] = source
    for entries in zip(*(each.native for each in ranks)):
        _native(entries)
    letters = defaultdict(list)
    for rank, each in enumerate(ranks):
        for x, to in each.sends:
            assert x.flags.c_contiguous
            letters[rank, to].append(x.copy())
    for rank, each in enumerate(ranks):
        for out, source in each.receives:
            assert out.flags.c_contiguous
            letter = letters[source, rank].pop(0)
            out[...] = letter.reshape(out.shape)
    assert not any(letters.values())
    for each in ranks:
        for source, target in each.unpack:
            target[...] = source


def _native(entries) -> None:
    kind = entries[0][0]
    for _, source, target, _ in entries:
        assert source.flags.c_contiguous
        assert target.flags.c_contiguous
    flat = [source.reshape(-1) for _, source, _, _ in entries]
    for rank, (_, _, target, _) in enumerate(entries):
        if kind == "all_gather":
            target[...] = np.concatenate(flat).reshape(target.shape)
        else:
            total = sum(flat)
            target[...] = (total if kind == "all_reduce" else np.split(total, RANKS)[rank]).reshape(target.shape)
