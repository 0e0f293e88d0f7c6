"""Ranks on threads: how they fail, and how they stay from one run to the next."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from onnxmesh.runtime.comm import CollectiveMismatch, CollectiveTimeout, Communicator, PeerFailed
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.threads import ThreadRanks, run_ranks


def test_the_first_error_is_raised_and_ends_the_others() -> None:
    ends: dict[int, BaseException] = {}

    def act(comm: Communicator) -> None:
        try:
            if comm.rank == 2:
                raise KeyError("mine")
            comm.barrier("tp" if comm.rank == 3 else None)  # in different groups
        except BaseException as error:
            ends[comm.rank] = error
            raise

    start = time.monotonic()
    with pytest.raises(KeyError, match="mine") as caught:
        run_ranks(Mesh.of(cp=2, tp=2), act, timeout=30)
    assert time.monotonic() - start < 5
    assert caught.value.rank == 2  # type: ignore[attr-defined]
    assert caught.value.__notes__ == ["raised on rank 2"]
    for rank in (0, 1, 3):
        error = ends[rank]
        assert isinstance(error, PeerFailed)
        assert (error.rank, error.error) == (2, "KeyError: 'mine'")


def test_abort_fails_the_others() -> None:
    def act(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.abort(OSError("disk full"))
        else:
            comm.barrier()

    with pytest.raises(OSError, match="disk full"):
        run_ranks(Mesh.of(tp=2), act)


@pytest.mark.parametrize("delay", [0.0, 0.7], ids=["left", "late"])
def test_a_rank_that_does_not_come_is_named(delay: float) -> None:
    def act(comm: Communicator) -> None:
        comm.all_reduce(np.zeros(2), "tp")
        if comm.rank in (1, 2):
            time.sleep(delay)
            return
        comm.all_gather(np.zeros((2, 3), np.float16), "tp")

    text = r"all_gather #1 of ranks \(0, 1, 2, 3\) on float16\[2, 3\], dim=0 timed out .* no sign of rank 1, 2"
    with pytest.raises(CollectiveTimeout, match=text) as caught:
        run_ranks(Mesh.of(tp=4), act, timeout=0.3)
    assert caught.value.missing == (1, 2)
    assert caught.value.call.kind == "all_gather"


@pytest.mark.parametrize(
    ("one", "other", "texts"),
    [
        (
            lambda c: c.all_reduce(np.zeros(2), "tp"),
            lambda c: c.all_gather(np.zeros(2), "tp"),
            ("all_reduce", "all_gather"),
        ),
        (
            lambda c: c.all_gather(np.zeros(2), "tp"),
            lambda c: c.all_gather(np.zeros(4), "tp"),
            ("float64[2]", "float64[4]"),
        ),
        (
            lambda c: c.shift(np.zeros(2), "tp"),
            lambda c: c.shift(np.zeros(2, np.float32), "tp"),
            ("float64[2]", "float32[2]"),
        ),
        (
            lambda c: c.all_reduce(np.zeros(2), "tp"),
            lambda c: c.all_reduce(np.zeros(2), "tp", "max"),
            ("op=sum", "op=max"),
        ),
        (
            lambda c: c.broadcast(np.zeros(2), "tp", 0),
            lambda c: c.broadcast(np.zeros(2), "tp", 1),
            ("root=0", "root=1"),
        ),
    ],
    ids=["kind", "shape", "dtype", "op", "root"],
)
def test_ranks_that_meet_with_different_calls(one: Any, other: Any, texts: tuple[str, str]) -> None:
    with pytest.raises(CollectiveMismatch) as caught:
        run_ranks(Mesh.of(tp=2), lambda c: one(c) if c.rank == 0 else other(c), timeout=5)
    for text in ("rank 0 is at", "rank 1 is at", *texts):
        assert text in str(caught.value).replace("but ", "")


# Ranks that stay


def test_the_same_threads_serve_every_run() -> None:
    with ThreadRanks(Mesh.of(tp=2)) as ranks:
        first = ranks.run(lambda c: threading.get_ident())
        assert ranks.run(lambda c: threading.get_ident()) == first
        assert ranks.run(lambda c: c is ranks.communicator(c.rank)) == [True, True]


def test_they_serve_again_after_an_error() -> None:
    def unequal(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.barrier("tp")
        raise ArithmeticError

    with ThreadRanks(Mesh.of(tp=2), timeout=5) as ranks:
        for _ in range(3):
            with pytest.raises(ArithmeticError):
                ranks.run(unequal)
            assert [r.item() for r in ranks.run(lambda c: c.all_reduce(np.array(1), "tp"))] == [2, 2]


def test_a_rank_that_hangs_does_not_hang_the_caller() -> None:
    go_on = threading.Event()

    def act(comm: Communicator) -> None:
        if comm.rank == 1:
            go_on.wait(30)
        comm.barrier()

    with ThreadRanks(Mesh.of(tp=2), timeout=0.1) as ranks:
        with pytest.raises(CollectiveTimeout, match="no sign of rank 1"):
            ranks.run(act)
        with pytest.raises(RuntimeError, match=r"an earlier run is still going on \(rank 1\)"):
            ranks.run(act)
        go_on.set()


def test_a_run_inside_a_run_is_refused() -> None:
    with (
        ThreadRanks(Mesh.of(tp=2), timeout=1) as ranks,
        pytest.raises(RuntimeError, match="an earlier run is still going on"),
    ):
        ranks.run(lambda c: ranks.run(lambda d: None))


def test_closing_ends_the_threads() -> None:
    ranks = ThreadRanks(Mesh.of(tp=2))
    names = ranks.run(lambda c: threading.current_thread())
    ranks.close()
    ranks.close()
    for thread in names:
        thread.join(5)
        assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        ranks.run(lambda c: None)


def test_threads_end_with_their_owner() -> None:
    ranks = ThreadRanks(Mesh.of(tp=2))
    workers = ranks.run(lambda c: threading.current_thread())
    del ranks
    for thread in workers:
        thread.join(5)
        assert not thread.is_alive()


def test_a_with_block_aborts_on_an_error() -> None:
    def act(comm: Any) -> None:
        with comm:
            if comm.rank == 0:
                raise LookupError("gone")
            comm.barrier()

    with pytest.raises(LookupError, match="gone"):
        run_ranks(Mesh.of(tp=2), act)
