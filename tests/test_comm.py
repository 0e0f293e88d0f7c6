"""The collectives, on threads, against NumPy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime.comm import (
    REDUCTIONS,
    Axis,
    Communicator,
    ReductionNotDefined,
)
from onnxmesh.runtime.host import HostCommunicator, LoneCommunicator
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.threads import ThreadRanks, run_ranks

Array = Any
Pieces = list[Array]

GROUPS: list[tuple[Mesh, Axis]] = [
    (Mesh.of(), "tp"),
    (Mesh.of(tp=2), "tp"),
    (Mesh.of(cp=4), "cp"),
    (Mesh.of(cp=2, tp=2), "tp"),
    (Mesh.of(cp=2, tp=2), "cp"),
    (Mesh.of(cp=2, tp=2), ("cp", "tp")),
    (Mesh.of(tp=8), "tp"),
]
OPS = ("sum", "prod", "min", "max", "avg")
DEFINED = [(dtype, op) for dtype in REDUCTIONS for op in OPS if op in REDUCTIONS[dtype]]
REFUSED = [(dtype, op) for dtype in REDUCTIONS for op in OPS if op not in REDUCTIONS[dtype]]
SHAPE = (8, 16)


@pytest.fixture(scope="module")
def threads() -> Iterator[Callable[[Mesh], ThreadRanks]]:
    """The rank threads of a mesh, started once."""
    started: dict[Mesh, ThreadRanks] = {}

    def ranks(mesh: Mesh) -> ThreadRanks:
        return started.setdefault(mesh, started.get(mesh) or ThreadRanks(mesh, timeout=10))

    yield ranks
    for each in started.values():
        each.close()


def sample(rank: int, dtype: str, shape: tuple[int, ...] = SHAPE) -> Array:
    """Values whose sums, products and averages over up to 8 ranks are exact in float32."""
    values = np.random.default_rng(rank).choice([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0], shape)
    return (values > 0 if dtype == "bool" else np.abs(values) if dtype == "uint8" else values).astype(dtype)


def reduction(op: str, pieces: Pieces) -> Array:
    """What NumPy says of it, in a dtype wide enough, rounded once."""
    stack = np.stack(pieces)
    if stack.dtype == bool:
        return {"min": stack.all, "max": stack.any}[op](axis=0)
    wide = stack if stack.dtype.name.startswith(("int", "uint")) else stack.astype(np.float64)
    fold = {"sum": np.add, "avg": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op]
    total = fold.reduce(wide, axis=0, dtype=wide.dtype)
    return (total / len(pieces) if op == "avg" else total).astype(stack.dtype)


def same(actual: Array, expected: Array) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return (
        actual.dtype == expected.dtype
        and actual.shape == expected.shape
        and np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()
    )


def check(
    ranks: ThreadRanks,
    axis: Axis,
    dtype: str,
    act: Callable[[Communicator, Array], Array],
    expected: Callable[[Pieces, int], Array],
) -> None:
    """On each rank of each group, `act` on its piece gives `expected` of (all pieces, its position)."""
    results = ranks.run(lambda comm: act(comm, sample(comm.rank, dtype)))
    for group in ranks.mesh.groups(axis):  # type: ignore[arg-type]
        pieces = [sample(rank, dtype) for rank in group]
        for position, rank in enumerate(group):
            assert same(results[rank], expected(pieces, position)), f"rank {rank}"


def cut(x: Array, dim: int, count: int, position: int) -> Array:
    return np.split(x, count, axis=dim)[position]


# What each collective is


@pytest.mark.parametrize(("dtype", "op"), DEFINED)
@pytest.mark.parametrize(("mesh", "axis"), GROUPS, ids=str)
class TestReducing:
    def test_all_reduce(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str, op: str) -> None:
        check(
            threads(mesh),
            axis,
            dtype,
            lambda comm, x: comm.all_reduce(x, axis, op),
            lambda pieces, _: reduction(op, pieces),
        )

    def test_reduce_scatter(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str, op: str) -> None:
        check(
            threads(mesh),
            axis,
            dtype,
            lambda comm, x: comm.reduce_scatter(x, axis, op, dim=1),
            lambda pieces, at: cut(reduction(op, pieces), 1, len(pieces), at),
        )

    def test_reduce(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str, op: str) -> None:
        check(
            threads(mesh),
            axis,
            dtype,
            lambda comm, x: comm.reduce(x, axis, op),
            lambda pieces, at: reduction(op, pieces) if at == 0 else None,
        )


@pytest.mark.parametrize("dtype", [*REDUCTIONS, "int16", "uint64", "complex64"])
@pytest.mark.parametrize(("mesh", "axis"), GROUPS, ids=str)
class TestMoving:
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_all_gather(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str, dim: int) -> None:
        check(
            threads(mesh),
            axis,
            dtype,
            lambda comm, x: comm.all_gather(x, axis, dim),
            lambda pieces, _: np.concatenate(pieces, dim),
        )

    @pytest.mark.parametrize(("split", "concat"), [(0, 1), (1, 0), (0, 0), (-1, -2)])
    def test_all_to_all(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str, split: int, concat: int) -> None:
        check(
            threads(mesh),
            axis,
            dtype,
            lambda comm, x: comm.all_to_all(x, axis, split, concat),
            lambda pieces, at: np.concatenate([cut(p, split, len(pieces), at) for p in pieces], concat),
        )

    def test_broadcast(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str) -> None:
        check(threads(mesh), axis, dtype, lambda comm, x: comm.broadcast(x, axis), lambda pieces, _: pieces[0])

    def test_gather(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str) -> None:
        check(
            threads(mesh),
            axis,
            dtype,
            lambda comm, x: comm.gather(x, axis, dim=1),
            lambda pieces, at: np.concatenate(pieces, 1) if at == 0 else None,
        )

    def test_scatter(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str) -> None:
        size = len(mesh.group(0, axis))  # type: ignore[arg-type]
        like = np.empty((8, 16 // size), dtype)

        def act(comm: Communicator, x: Array) -> Array:
            root = comm.rank == mesh.group(comm.rank, axis)[0]  # type: ignore[arg-type]
            return comm.scatter(x, axis, dim=1) if root else comm.scatter(None, axis, dim=1, like=like)

        check(threads(mesh), axis, dtype, act, lambda pieces, at: cut(pieces[0], 1, len(pieces), at))

    @pytest.mark.parametrize("offset", [1, -1, 3, 0])
    def test_shift(self, threads: Any, mesh: Mesh, axis: Axis, dtype: str, offset: int) -> None:
        check(
            threads(mesh),
            axis,
            dtype,
            lambda comm, x: comm.shift(x, axis, offset),
            lambda pieces, at: pieces[(at - offset) % len(pieces)],
        )


def test_the_root_is_a_position_in_the_group(threads: Any) -> None:
    """On a 2 x 2 mesh, root 1 along cp is rank 2 for ranks 0 and 2, rank 3 for ranks 1 and 3."""

    def act(comm: Communicator) -> tuple[Array, Array, Array]:
        x = np.array([comm.rank])
        pair = np.array([10, 20]) + comm.rank
        like = np.empty(1, np.int64)
        scattered = comm.scatter(pair if comm.rank >= 2 else None, "cp", root=1, like=like)
        return comm.broadcast(x, "cp", root=1), scattered, comm.reduce(x, "cp", "sum", root=1)

    results = threads(Mesh.of(cp=2, tp=2)).run(act)
    assert [r[0].tolist() for r in results] == [[2], [3], [2], [3]]
    assert [r[1].tolist() for r in results] == [[12], [13], [22], [23]]
    assert [None if r[2] is None else r[2].tolist() for r in results] == [None, None, [2], [4]]


def test_a_group_may_be_given_by_its_ranks_in_their_order(threads: Any) -> None:
    groups = {0: (3, 0), 3: (3, 0), 1: (1, 2), 2: (1, 2)}
    results = threads(Mesh.of(tp=4)).run(lambda c: c.all_gather(np.array([c.rank]), groups[c.rank]))
    assert [r.tolist() for r in results] == [[3, 0], [1, 2], [1, 2], [3, 0]]


def test_scalars_and_empty_arrays(threads: Any) -> None:
    def act(comm: Communicator) -> tuple[Array, Array]:
        return comm.all_reduce(np.array(comm.rank), "tp"), comm.all_gather(np.empty((0, 3)), "tp")

    for scalar, empty in threads(Mesh.of(tp=4)).run(act):
        assert (scalar.shape, scalar.item(), empty.shape) == ((), 6, (0, 3))


def test_a_transposed_view_can_be_sent(threads: Any) -> None:
    x = np.arange(6).reshape(2, 3).T
    for result in threads(Mesh.of(tp=2)).run(lambda c: c.all_gather(x, "tp")):
        assert np.array_equal(result, np.concatenate([x, x]))


def test_the_barrier_waits_for_the_whole_mesh(threads: Any) -> None:
    arrived = []

    def act(comm: Communicator) -> int:
        time.sleep(0.01 * comm.rank)
        arrived.append(comm.rank)
        comm.barrier()
        return len(arrived)

    assert threads(Mesh.of(cp=2, tp=2)).run(act) == [4] * 4


def test_64_ranks() -> None:
    results = run_ranks(Mesh.of(dp=4, cp=4, tp=4), lambda c: c.all_reduce(np.ones(3), ("dp", "cp", "tp")))
    assert all(r.tolist() == [64] * 3 for r in results)


# How it reduces


def test_narrow_floats_are_rounded_once(threads: Any) -> None:
    """In bfloat16, 256 + 1 is 256: step by step the sum would stay there."""

    def act(comm: Communicator) -> Array:
        return comm.all_reduce(np.array([1 if comm.rank else 256], ml_dtypes.bfloat16), "tp")

    assert [float(r[0]) for r in threads(Mesh.of(tp=4)).run(act)] == [260] * 4


def test_reductions_run_in_rank_order(threads: Any) -> None:
    """(1e8 + 1) - 1e8 is 0 in float32, in any other order it is 1."""
    values = np.array([1e8, 1, -1e8, 0], np.float32)
    for _ in range(3):
        results = threads(Mesh.of(tp=4)).run(lambda c: c.all_reduce(values[c.rank : c.rank + 1], "tp"))
        assert [r.tolist() for r in results] == [[0]] * 4


@pytest.mark.parametrize("size", [HostCommunicator.SPLIT_FROM - 1, HostCommunicator.SPLIT_FROM + 3])
def test_a_large_all_reduce_gives_the_same_bits_on_every_rank(threads: Any, size: int) -> None:
    pieces = [np.random.default_rng(r).standard_normal((1, size), np.float32) for r in range(4)]
    expected = ((pieces[0] + pieces[1]) + pieces[2]) + pieces[3]
    for result in threads(Mesh.of(tp=4)).run(lambda c: c.all_reduce(pieces[c.rank], "tp")):
        assert same(result, expected)


def test_nan_wins_every_reduction(threads: Any) -> None:
    def act(comm: Communicator) -> list[float]:
        x = np.array([np.nan if comm.rank == 1 else 1], np.float32)
        return [comm.all_reduce(x, "tp", op).item() for op in OPS]

    assert all(np.isnan(threads(Mesh.of(tp=2)).run(act)).ravel())


def test_what_does_not_fit_overflows_without_a_warning(threads: Any, recwarn: pytest.WarningsRecorder) -> None:
    def act(comm: Communicator) -> list[float]:
        big = [np.array([6e4], np.float16), np.array([57344], "float8_e5m2"), np.array([448], "float8_e4m3fn")]
        return [float(comm.all_reduce(x, "tp")[0]) for x in big] + [
            comm.all_reduce(np.array([100], np.int8), "tp").item()
        ]

    for half, e5m2, e4m3, wrapped in threads(Mesh.of(tp=2)).run(act):
        assert (half, e5m2, wrapped) == (np.inf, np.inf, -56)
        assert np.isnan(e4m3)  # this format has no infinity
    assert not recwarn.list


# Buffers


@pytest.mark.parametrize(
    "act",
    [
        lambda c, x: c.all_reduce(x, "tp"),
        lambda c, x: c.all_gather(x, "tp"),
        lambda c, x: c.all_to_all(x, "tp"),
        lambda c, x: c.broadcast(x, "tp"),
        lambda c, x: c.shift(x, "tp"),
    ],
)
@pytest.mark.parametrize("mesh", [Mesh.of(tp=1), Mesh.of(tp=4)], ids=str)
def test_input_and_result_may_be_overwritten(threads: Any, mesh: Mesh, act: Any) -> None:
    def expected(comm: Communicator) -> Array:
        return act(comm, np.full(4, comm.rank))

    def actual(comm: Communicator) -> Array:
        x = np.full(4, comm.rank)
        result = act(comm, x)
        kept = result.copy()
        result[:] = -1
        assert x.tolist() == [comm.rank] * 4
        x[:] = -2
        time.sleep(0.005 * comm.rank)
        return kept

    assert np.array_equal(threads(mesh).run(expected), threads(mesh).run(actual))


def test_a_fast_rank_may_run_ahead_into_the_next_collective(threads: Any) -> None:
    def act(comm: Communicator) -> list[int]:
        x = np.zeros(1, np.int64)
        seen = []
        for step in range(200):
            x[0] = comm.rank + step
            seen.append(comm.all_reduce(x, "tp").item())
        return seen

    assert threads(Mesh.of(tp=4)).run(act) == [[6 + 4 * step for step in range(200)]] * 4


# What is refused


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "reduce"])
@pytest.mark.parametrize(("dtype", "op"), [*REFUSED, ("int16", "sum"), ("complex64", "sum"), ("float32", "xor")])
def test_a_reduction_that_is_not_in_the_table(collective: str, dtype: str, op: str) -> None:
    comm = LoneCommunicator(Mesh.of(tp=2), 0)
    with pytest.raises(ReductionNotDefined, match=f"reduce op {op} is not defined for {dtype}"):
        getattr(comm, collective)(np.ones(2, dtype), "tp", op)


def test_the_table() -> None:
    assert ("int32", "avg") in REFUSED
    assert [op for dtype, op in REFUSED if dtype == "bool"] == ["sum", "prod", "avg"]
    assert not [pair for pair in REFUSED if pair[0].startswith(("float", "bfloat"))]
    assert issubclass(ReductionNotDefined, TypeError)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda c, x: c.reduce_scatter(x, "tp"), r"dim 0 of shape \[3, 4\] does not divide among 4 ranks"),
        (lambda c, x: c.all_to_all(x, "tp"), "does not divide"),
        (lambda c, x: c.scatter(x, "tp"), "does not divide"),
        (lambda c, x: c.scatter(None, "tp", root=1), "needs x on the root, and like"),
        (lambda c, x: c.all_gather(x, "tp", dim=2), r"no dim 2 in shape \[3, 4\]"),
        (lambda c, x: c.all_to_all(x, "tp", 1, -3), "no dim -3"),
        (lambda c, x: c.broadcast(x, "tp", root=4), "root 4 is not a position"),
        (lambda c, x: c.reduce(x, "tp", root=-1), "root -1 is not a position"),
        (lambda c, x: c.all_reduce(x, "pp"), "unknown mesh axis 'pp'"),
        (lambda c, x: c.all_reduce(x, (1, 2)), "a group must hold rank 0"),
        (lambda c, x: c.all_reduce(x, (0, 0)), "each rank once"),
        (lambda c, x: c.all_reduce(x, (0, 9)), "ranks 0 to 3, got 9"),
        (lambda c, x: c.all_reduce(x, (0, "tp")), "unknown mesh axis 0"),
    ],
)
def test_wrong_arguments(act: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        act(LoneCommunicator(Mesh.of(tp=4), 0), np.zeros((3, 4)))


@pytest.mark.parametrize("dtype", [object, ">f4"])
def test_arrays_that_are_not_plain_native_numbers(dtype: Any) -> None:
    with pytest.raises(TypeError, match="cannot send dtype"):
        LoneCommunicator(Mesh.of(tp=4), 0).all_gather(np.zeros(2, dtype), "tp")
