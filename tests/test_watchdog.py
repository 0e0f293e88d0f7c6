"""The watchdog of a rank on a GPU, with communicators that only note that they were aborted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from onnxmesh.runtime import nccl, rendezvous
from onnxmesh.runtime.comm import PeerFailed
from onnxmesh.runtime.cuda.device import own_gpu
from onnxmesh.runtime.cuda.foreign import is_on_gpu, stream_pointer
from onnxmesh.runtime.cuda.progress import where
from onnxmesh.runtime.errors import InvalidArgument, RunError
from onnxmesh.runtime.nccl import NcclGroups
from onnxmesh.runtime.plan import Collective, Launch, Program
from onnxmesh.runtime.rendezvous import Place, StoreServer, World


class Pretended:
    """A communicator, and a wait that ends when it is aborted."""

    def __init__(self) -> None:
        self.aborted, self.destroyed = threading.Event(), False

    def abort(self) -> None:
        self.aborted.set()

    def destroy(self) -> None:
        self.destroyed = True


Rank = tuple[NcclGroups, Pretended]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Queue[int]:
    """Where the exit status goes instead of ending the process."""
    told: Queue[int] = Queue()
    monkeypatch.setattr(nccl, "_GRACE", 0.3)
    monkeypatch.setattr(nccl.os, "_exit", told.put)
    return told


@pytest.fixture
def ranks(ends: Queue[int]) -> Iterator[list[Rank]]:
    server = StoreServer()
    made = []
    for rank in range(2):
        world = World(Place(rank, 2, rank, "127.0.0.1", server.port), 0.5, serve=False)
        communicator = Pretended()
        made.append((NcclGroups(world, {(0, 1): communicator}), communicator))
    yield made
    for groups, _ in made:
        groups.close()
        groups.world.close()
    server.close()


def test_a_wait_that_is_too_long_ends_on_every_rank(ranks: list[Rank]) -> None:
    (groups, own), (_, other) = ranks
    groups.where = lambda: "at instruction 14, AllToAll along cp of node 'attn'"
    text = r"rank 0 waited 0\.5 s at instruction 14, AllToAll along cp of node 'attn'"
    with pytest.raises(RunError, match=text), groups.guard():
        assert own.aborted.wait(5)
    assert other.aborted.wait(5)
    with pytest.raises(PeerFailed, match=r"rank 0 failed: RunError: rank 0 waited 0\.5 s at instruction 14"):
        ranks[1][0].check()


def test_the_silent_rank_is_named(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_SILENT", -1.0)  # whoever has ever said anything
    (groups, own), _ = ranks
    with pytest.raises(RunError, match="no sign of life from rank 0, 1"), groups.guard():
        assert own.aborted.wait(5)


def test_a_wait_may_be_longer_if_it_says_so(ranks: list[Rank]) -> None:
    groups, own = ranks[0]
    with groups.guard(30), groups.guard():
        assert not own.aborted.wait(1)
    groups.check()


def test_an_error_that_follows_from_a_failure_is_not_told(ranks: list[Rank]) -> None:
    (groups, own), (other, _) = ranks
    assert other.world.store is not None
    other.world.store.fail(ValueError("broken"))

    def wait() -> None:
        with groups.guard():
            assert own.aborted.wait(5)
            raise OSError("CUDA error: unspecified")

    with pytest.raises(PeerFailed, match="rank 1 failed: ValueError: broken"):
        wait()


def test_what_is_enqueued_has_a_deadline_too(ranks: list[Rank]) -> None:
    groups, own = ranks[0]
    groups.expect(lambda: True)
    assert not own.aborted.wait(1)
    groups.expect(lambda: False)
    assert own.aborted.wait(5)
    with pytest.raises(RunError, match="waited"):
        groups.check()


def test_a_process_that_still_works_on_it_is_ended(ranks: list[Rank], ends: Queue[int], capsys: Any) -> None:
    groups, _ = ranks[0]
    with groups.attend():
        groups.abort(PeerFailed(1, "its process ended"))
        assert ends.get(timeout=5) == RunError.exit_code
    assert "error: rank 0 ends: rank 1 failed: its process ended" in capsys.readouterr().err


def test_a_process_that_was_told_goes_on(ranks: list[Rank], ends: Queue[int]) -> None:
    groups, _ = ranks[0]
    groups.abort(PeerFailed(1, "its process ended"))
    time.sleep(0.8)
    assert ends.empty()
    with pytest.raises(PeerFailed), groups.attend():
        pass


def test_the_caller_s_own_communicator_stays_open() -> None:
    kept, split = Pretended(), Pretended()
    groups = NcclGroups(World.apart(0, 4, 0), {(0, 1, 2, 3): kept, (0, 2): split}, kept)
    assert groups.of((0, 2)) is split
    with pytest.raises(RunError, match=r"no communicator for ranks \(0, 3\)"):
        groups.of((0, 3))
    groups.close()
    assert (kept.destroyed, split.destroyed) == (False, True)


def test_ranks_go_on_together_or_not_at_all() -> None:
    server = StoreServer()
    worlds = [World(Place(rank, 2, rank, "127.0.0.1", server.port), 5, serve=False) for rank in range(2)]
    found: Queue[Exception] = Queue()

    def other() -> None:
        try:
            worlds[1].together(None)
            worlds[1].together(None)
        except Exception as error:
            found.put(error)

    thread = threading.Thread(target=other)
    thread.start()
    worlds[0].together(None)
    with pytest.raises(ValueError, match="damaged"):
        worlds[0].together(ValueError("damaged"))
    thread.join()
    assert str(found.get(timeout=5)) == "rank 0 failed: ValueError: damaged"


def test_where_a_program_is() -> None:
    steps = (Launch("Relu", (), (), node="act"), Collective("AllToAll", "cp", (), (), node="attn"))
    program = Program({}, (), (), (), steps, 0)
    assert where(program, 0) == "at instruction 0, Relu of node 'act'"
    assert where(program, 1) == "at instruction 1, AllToAll along cp of node 'attn'"
    assert where(program, -1) == "before its first collective"


@pytest.mark.parametrize(("local_rank", "count", "visible", "gpu"), [
    (0, 1, None, 0), (3, 8, None, 3), (3, 8, "0,1,2,3,4,5,6,7", 3), (3, 1, "3", 0), (0, 1, "5", 0),
])  # fmt: skip
def test_the_gpu_of_a_rank(local_rank: int, count: int, visible: str | None, gpu: int) -> None:
    assert own_gpu(local_rank, count, visible) == gpu


@pytest.mark.parametrize(("count", "visible"), [(2, None), (1, None), (2, "0,1")])
def test_more_ranks_than_gpus(count: int, visible: str | None) -> None:
    with pytest.raises(RunError, match=f"rank 4 of this host has no GPU: its process sees {count}"):
        own_gpu(4, count, visible)


def test_streams_of_any_library() -> None:
    protocol = SimpleNamespace(__cuda_stream__=lambda: (0, 7))
    for stream in (7, SimpleNamespace(ptr=7), SimpleNamespace(cuda_stream=7), protocol):
        assert stream_pointer(stream) == 7
    with pytest.raises(InvalidArgument, match="not a CUDA stream: str"):
        stream_pointer("x")


def test_where_an_array_is() -> None:
    assert is_on_gpu(SimpleNamespace(__dlpack_device__=lambda: (2, 0)))
    assert is_on_gpu(SimpleNamespace(__cuda_array_interface__={}))
    assert not is_on_gpu(SimpleNamespace(__dlpack_device__=lambda: (1, 0)))
    assert not is_on_gpu([1.0])
