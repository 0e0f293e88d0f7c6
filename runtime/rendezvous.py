"""How ranks find each other: their place, from the environment, and a small key-value store over TCP.

The store carries text only, as JSON (see runtime/frames.py). It also notices ranks that die: a connection that ends
without a goodbye is a failure, and every rank that waits, or watches, is told.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from onnxmesh.runtime import frames
from onnxmesh.runtime.comm import PeerFailed
from onnxmesh.runtime.errors import RunError

PORT = 29417
"""Where the store listens if nothing says so."""

_AGENT_STORE_OFFSET = 17
_BEAT = 1.0
"""Seconds between two signs of life of a rank that watches."""
_SILENT = 3.5
"""Seconds without a sign of life after which a rank counts as silent."""
_ANSWER = 2.0
"""Seconds that the store may take to answer."""
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, and by convention everything
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH and its kin
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; not a batch script itself
)


@dataclass(frozen=True)
class Place:
    """This process among the ranks, and where their store is."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """What a launcher (torchrun, mpirun, srun) says in the environment; None if there is none.

    Raises:
        RunError: the variables hold no numbers, or a rank that is not there.
    """
    for names in _VARIABLES:
        if names[0] in environ and names[1] in environ:
            rank, size = (_number(environ, name) for name in names[:2])
            local = _number(environ, names[2]) if names[2] in environ else rank
            if not 0 <= rank < size:
                raise RunError(f"{names[0]}={rank} is not a rank of {names[1]}={size}", code="OM5106")
            return Place(rank, size, local, _host(environ), _port(environ))
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdigit():
        raise RunError(f"{name}={environ[name]!r} is not a number", code="OM5106")
    return int(environ[name])


def _host(environ: Mapping[str, str]) -> str:
    """MASTER_ADDR; else the first of Slurm's nodes (`gpu[03-07],x` starts with gpu03); else this host."""
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    first = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    default = "".join(part or "" for part in first.groups()) if first else "127.0.0.1"
    return environ.get("MASTER_ADDR", default)


def _port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT; torchrun's agent listens there itself, so under it the store takes a port further on."""
    port = _number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else PORT
    return port + _AGENT_STORE_OFFSET if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else port


def no_sign(ranks: Sequence[int]) -> str:
    """That these ranks are silent, in words."""
    return f"no sign of life from rank {', '.join(map(str, ranks))}"


class StoreServer:
    """Holds the keys. Runs in threads of rank 0, or of the process that started the ranks."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._values: dict[str, str] = {}
        self._seen: dict[int, float] = {}
        self._present = 0
        self._changed = threading.Condition()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="onnxmesh-store", daemon=True).start()

    def fail(self, rank: int, error: str) -> None:
        """Tell all ranks that one has failed; only the first failure counts."""
        with self._changed:
            self._values.setdefault("failure", f"{rank} {error}")
            self._changed.notify_all()

    @property
    def has_failure(self) -> bool:
        """Whether a rank has failed."""
        return "failure" in self._values

    def silent(self) -> list[int]:
        """The ranks that watch, or did, and have given no sign of life lately."""
        with self._changed:
            now = time.monotonic()
            return sorted(rank for rank, seen in self._seen.items() if now - seen > _SILENT)

    def close(self, linger: float = 0.0) -> None:
        """Stop listening, once the ranks have left, but after `linger` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._present, linger)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        rank: int | None = None
        with connection, suppress(OSError, KeyError, TypeError, ValueError):
            while (frame := frames.receive(connection)) is not None:
                request = frame[0]
                if request["op"] == "hello":
                    rank = int(request["rank"])
                    self._count(1)
                elif request["op"] == "bye" and rank is not None:
                    self._count(-1)
                    with self._changed:
                        self._seen.pop(rank, None)
                    rank = None
                frames.send(connection, self._answer(request))
        if rank is not None:
            self.fail(rank, "its process ended")
            self._count(-1)

    def _answer(self, request: frames.Header) -> frames.Header:
        if request["op"] == "set":
            with self._changed:
                self._values[str(request["key"])] = str(request["value"])
                self._changed.notify_all()
        elif request["op"] == "fail":
            silent = self.silent() if request["waited"] else []
            text = f"{request['error']}; {no_sign(silent)}" if silent else str(request["error"])
            self.fail(int(request["rank"]), text)
            return {"silent": silent}
        elif request["op"] == "watch":
            with self._changed:
                self._seen[int(request["rank"])] = time.monotonic()
            return self._get("", _BEAT)
        elif request["op"] == "get":
            return self._get(str(request["key"]), float(request["timeout"]))
        return {}

    def _get(self, key: str, timeout: float) -> frames.Header:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values or "failure" in self._values, timeout)
            if key in self._values:
                return {"value": self._values[key]}
            return {"failure": self._values["failure"]} if "failure" in self._values else {}

    def _count(self, change: int) -> None:
        with self._changed:
            self._present += change
            self._changed.notify_all()


class Store:
    """One rank's connection to the store.

    Raises:
        RunError: nothing answers at the address within `timeout` seconds.
    """

    def __init__(self, host: str, port: int, rank: int, timeout: float = 60.0) -> None:
        self.rank, self.timeout = rank, timeout
        self._address = (host, port)
        self._lock = threading.Lock()
        self._socket = _connect(host, port, timeout)
        self._closed = False
        self._watcher: socket.socket | None = None
        self._ask({"op": "hello", "rank": rank})

    def set(self, key: str, value: str) -> None:
        """Give a key its value."""
        self._ask({"op": "set", "key": key, "value": value})

    def get(self, key: str, who: str = "another rank", within: float = 0.0) -> str:
        """The value of a key, as soon as there is one, `within` so many seconds (or the timeout).

        Raises:
            PeerFailed: another rank has failed.
            RunError: nobody has set it in time; the message says that `who` is missing.
        """
        within = within or self.timeout
        answer = self._ask({"op": "get", "key": key, "timeout": within})
        if "value" in answer:
            return str(answer["value"])
        if "failure" in answer:
            raise _failure(answer["failure"])
        raise RunError(
            f"rank {self.rank} waited {within:g} s for {who} in vain",
            hint="have all ranks been started? if one is only slow, raise the timeout",
            code="OM5105",
        )

    def fail(self, error: BaseException, *, waited: bool = False) -> list[int]:
        """Tell the other ranks that this one has failed; if it `waited`, which ranks gave no sign of life lately.

        This goes over a connection of its own, since another may be waiting. A store that does not answer is rank 0's
        fault, as far as anyone can tell.
        """
        text = " ".join(f"{type(error).__name__}: {error.args[0] if error.args else error}".split())
        with suppress(OSError, RunError), _connect(*self._address, 1.0) as connection:
            connection.settimeout(_ANSWER)
            frames.send(connection, {"op": "fail", "rank": self.rank, "error": text, "waited": waited})
            frame = frames.receive(connection)
            if frame is not None:
                return [int(rank) for rank in frame[0].get("silent", ())]
        return [0] if waited else []

    def watch(self, callback: Callable[[PeerFailed], None]) -> None:
        """Call `callback` from another thread when a rank fails or the store is gone."""
        self._watcher = _connect(*self._address, self.timeout)
        threading.Thread(target=self._watch, args=(self._watcher, callback), daemon=True).start()

    def close(self) -> None:
        """Say goodbye. May be called again."""
        if self._closed:
            return
        self._closed = True
        with suppress(PeerFailed):
            self._ask({"op": "bye"})
        for connection in (self._socket, self._watcher):
            if connection is not None:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()

    def _watch(self, connection: socket.socket, callback: Callable[[PeerFailed], None]) -> None:
        failure = "-1 the rank that holds the store has ended"
        with suppress(OSError):
            while not self._closed:
                frames.send(connection, {"op": "watch", "rank": self.rank})
                frame = frames.receive(connection)
                if frame is None or "failure" in frame[0]:
                    failure = frame[0]["failure"] if frame else failure
                    break
        if not self._closed:
            callback(_failure(failure))

    def _ask(self, request: frames.Header) -> frames.Header:
        try:
            with self._lock:
                self._socket.settimeout(float(request.get("timeout", 0)) + _ANSWER)
                frames.send(self._socket, request)
                frame = frames.receive(self._socket)
        except OSError:
            frame = None
        if frame is None:
            raise PeerFailed(0, "its store is gone")
        return frame[0]


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    end = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic()))
        except OSError as error:
            if time.monotonic() >= end:
                raise RunError(
                    f"rank 0 does not answer at {host}:{port}: {error}",
                    hint="have all ranks been started? MASTER_ADDR and MASTER_PORT say where rank 0 is",
                    code="OM5105",
                ) from error
            time.sleep(0.05)
        else:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def _failure(text: str) -> PeerFailed:
    rank, _, error = text.partition(" ")
    return PeerFailed(int(rank), error)


class World:
    """All ranks of a job, met over a store. Without a place it is a world of one.

    With `serve` rank 0 holds the store; else the process that started the ranks does. Ranks that another library has
    brought together meet by `from_mpi` or `meet`.
    """

    def __init__(self, place: Place | None = None, timeout: float = 60.0, *, serve: bool = True) -> None:
        self.rank, self.size, self.local_rank = (place.rank, place.size, place.local_rank) if place else (0, 1, 0)
        self.timeout = timeout
        self.store: Store | None = None
        self._server: StoreServer | None = None
        self._met = 0
        if place is None or place.size == 1:
            return
        if serve and place.rank == 0:
            self._server = _serve(place)
        self.store = Store(place.host, place.port, place.rank, timeout)

    @classmethod
    def from_mpi(cls, comm: Any, timeout: float = 60.0) -> World:
        """The ranks of an mpi4py communicator; it is used to meet, and not afterwards."""
        from mpi4py import MPI

        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank = int(host.rank)
        host.Free()
        return cls.meet(comm.rank, comm.size, local_rank, comm.bcast, timeout)

    @classmethod
    def meet(
        cls, rank: int, size: int, local_rank: int, broadcast: Callable[[Any], Any], timeout: float = 60.0
    ) -> World:
        """Ranks that can reach each other already: `broadcast(value)` gives rank 0's value on all of them."""
        if size == 1:
            return cls(None, timeout)
        server = StoreServer("") if rank == 0 else None
        name, port = broadcast((socket.gethostname(), server.port) if server is not None else None)
        host = "127.0.0.1" if name == socket.gethostname() else name
        world = cls(Place(rank, size, local_rank, host, port), timeout, serve=False)
        world._server = server
        return world

    @classmethod
    def apart(cls, rank: int, size: int, local_rank: int, timeout: float = 60.0) -> World:
        """Ranks without a store: they know their number, and cannot tell each other anything."""
        world = cls(None, timeout)
        world.rank, world.size, world.local_rank = rank, size, local_rank
        return world

    def together(self, error: Exception | None, within: float = 0.0) -> None:
        """Go on only if no rank has an `error`; every rank calls it. Ranks without a store do not ask each other.

        Args:
            within: seconds that ranks may arrive after each other; the timeout if not given.

        Raises `error`, or PeerFailed with that of the first rank that has one.
        """
        if self.store is None:
            texts = ["" if error is None else str(error)]
        else:
            told = "" if error is None else f"{type(error).__name__}: {error.args[0] if error.args else error}"
            texts = self.allgather(told, within)
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text:
                raise PeerFailed(rank, text)

    def allgather(self, value: Any, within: float = 0.0) -> list[Any]:
        """Every rank's value (JSON data), by rank, `within` so many seconds (or the timeout). Raises as `Store.get`."""
        if self.size == 1:
            return [value]
        if self.store is None:
            raise RunError("the ranks have no store", code="OM5106")
        self._met += 1
        self.store.set(f"all/{self._met}/{self.rank}", json.dumps(value))
        keys = [f"all/{self._met}/{rank}" for rank in range(self.size)]
        return [json.loads(self.store.get(key, f"rank {rank}", within)) for rank, key in enumerate(keys)]

    def close(self) -> None:
        """Leave. The rank that holds the store waits a moment for the others."""
        if self.store is not None:
            self.store.close()
        if self._server is not None:
            self._server.close(linger=1.0 if self._server.has_failure else 5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(place: Place) -> StoreServer:
    """The store, on this host alone if it is a local address."""
    local = place.host in ("127.0.0.1", "localhost")
    try:
        return StoreServer("127.0.0.1" if local else "", place.port)
    except OSError as error:
        raise RunError(
            f"port {place.port} cannot be opened: {error.strerror}", hint="set another MASTER_PORT", code="OM5107"
        ) from error
