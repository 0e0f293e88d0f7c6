"""Places from the environment, frames, and the store, with ranks as threads."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Queue

import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime import frames, rendezvous
from onnxmesh.runtime.comm import PeerFailed
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.rendezvous import PORT, Place, Store, StoreServer, World, find_place

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}


@pytest.mark.parametrize(("environ", "place"), [
    ({}, None),
    ({"RANK": "1"}, None),
    (TORCHRUN, Place(3, 8, 1, "a", 7)),
    ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, Place(3, 8, 1, "a", 24)),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
     Place(1, 2, 0, "127.0.0.1", PORT)),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place(1, 2, 1, "127.0.0.1", PORT)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-07],x"},
     Place(1, 4, 1, "gpu03", PORT)),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n1,n2"}, Place(1, 4, 1, "n1", PORT)),
])  # fmt: skip
def test_the_place_that_a_launcher_gives(environ: dict[str, str], place: Place | None) -> None:
    assert find_place(environ) == place


@pytest.mark.parametrize("change", [{"RANK": "8"}, {"RANK": "x"}, {"WORLD_SIZE": "-1"}, {"MASTER_PORT": "p"}])
def test_a_place_that_cannot_be(change: dict[str, str]) -> None:
    with pytest.raises(RunError):
        find_place({**TORCHRUN, **change})


def test_arrays_of_every_kind_travel() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.array([1.5], ml_dtypes.bfloat16),
        "empty": np.empty((0, 3), np.int64),
        "scalar": np.array(True),
    }
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames.send(ours, {"x": 1}, arrays)
        received = frames.receive(theirs)
        assert received is not None
        assert received[0] == {"x": 1}
        for name, array in arrays.items():
            got = received[1][name]
            assert (got.dtype, got.shape) == (array.dtype, array.shape)
            assert got.tobytes() == array.tobytes()
        ours.close()
        assert frames.receive(theirs) is None


@pytest.mark.parametrize("data", [
    b"\xff\xff\xff\xffx",
    b"\0\0\0\x02[]",
    b"\0\0\0\x09{\"arrays\":",
    b"\0\0",
    b'\0\0\0\x1c{"arrays":[["x","object",[]]]}'[:32],
])  # fmt: skip
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.close()
        with pytest.raises(ConnectionError):
            frames.receive(theirs)


def worlds(size: int, server: StoreServer, timeout: float = 10.0) -> list[World]:
    return [World(Place(r, size, r, "127.0.0.1", server.port), timeout, serve=False) for r in range(size)]


def test_ranks_gather_values_again_and_again() -> None:
    server = StoreServer()
    ranks = worlds(3, server)
    with ThreadPoolExecutor(3) as pool:
        for turn in range(3):
            results = list(pool.map(lambda world, turn=turn: world.allgather([world.rank, turn]), ranks))
            assert results == [[[rank, turn] for rank in range(3)]] * 3
    for world in ranks:
        world.close()
    server.close(linger=5)


def test_rank_0_may_hold_the_store() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(lambda r: World(Place(r, 2, r, "127.0.0.1", port), 10), (1, 0)))
        assert list(pool.map(lambda world: world.allgather(world.rank), ranks)) == [[0, 1]] * 2
        list(pool.map(World.close, ranks))


def test_a_world_of_one() -> None:
    with World() as world:
        assert world.allgather("x") == ["x"]


def test_a_rank_that_ends_without_goodbye_is_a_failure_for_all() -> None:
    server = StoreServer()
    first, second = worlds(2, server)
    told: Queue[PeerFailed] = Queue()
    assert first.store is not None and second.store is not None
    first.store.watch(told.put)
    second.store._socket.shutdown(socket.SHUT_RDWR)
    assert told.get(timeout=5).rank == 1
    with pytest.raises(PeerFailed, match="rank 1 failed: its process ended"):
        first.allgather(0)


def test_the_first_failure_is_the_one_that_is_told() -> None:
    server = StoreServer()
    first, second = worlds(2, server)
    assert first.store is not None and second.store is not None
    second.store.fail(ValueError("broken"))
    second.store.fail(ValueError("again"))
    with pytest.raises(PeerFailed, match="rank 1 failed: ValueError: broken"):
        first.store.get("k")


def test_a_rank_that_gives_no_sign_of_life_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_SILENT", 0.3)
    server = StoreServer()
    ranks = worlds(3, server)
    told: Queue[PeerFailed] = Queue()
    stores = [world.store for world in ranks if world.store is not None]
    stores[1]._ask({"op": "watch", "rank": 1})  # and never again: it takes a second, too
    stores[2].watch(told.put)
    assert stores[0].fail(ValueError("long"), waited=True) == [1]
    assert told.get(timeout=5).error == "ValueError: long; no sign of life from rank 1"


def test_a_store_that_does_not_answer_is_rank_0_s_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ANSWER", 0.2)
    server = StoreServer()
    store = Store("127.0.0.1", server.port, 1, 5)
    monkeypatch.setattr(server, "_answer", lambda request: time.sleep(1))
    assert store.fail(ValueError("long"), waited=True) == [0]
    with pytest.raises(PeerFailed, match="rank 0 failed: its store"):
        store.set("k", "v")


def test_ranks_that_another_library_brought_together() -> None:
    box: Queue[object] = Queue()

    def broadcast(rank: int, value: object) -> object:
        if rank:
            return box.get(timeout=5)
        for _ in range(2):
            box.put(value)
        return value

    with ThreadPoolExecutor(3) as pool:
        meet = lambda rank: World.meet(rank, 3, rank, partial(broadcast, rank), 10)  # noqa: E731
        ranks = list(pool.map(meet, range(3)))
        assert list(pool.map(lambda world: world.allgather(world.local_rank), ranks)) == [[0, 1, 2]] * 3
        list(pool.map(World.close, ranks))


def test_a_store_that_ends_is_noticed() -> None:
    server = StoreServer()
    store = Store("127.0.0.1", server.port, 0, 5)
    told: Queue[PeerFailed] = Queue()
    store.watch(told.put)
    assert store._watcher is not None
    store._watcher.shutdown(socket.SHUT_RDWR)
    assert "has ended" in told.get(timeout=5).error


def test_nobody_comes() -> None:
    server = StoreServer()
    store = Store("127.0.0.1", server.port, 0, timeout=0.2)
    with pytest.raises(RunError, match=r"rank 0 waited 0\.2 s for rank 1 in vain"):
        store.get("k", "rank 1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RunError, match=f"rank 0 does not answer at 127.0.0.1:{port}"):
        Store("127.0.0.1", port, 1, timeout=0.2)
