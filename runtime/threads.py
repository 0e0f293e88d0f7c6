"""Ranks as threads of one process: the communicator behind plans on local CPU ranks."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Self, TypeVar

import numpy as np

from onnxmesh.runtime.comm import (
    Call,
    CollectiveMismatch,
    CollectiveTimeout,
    Communicator,
    Parcels,
    PeerFailed,
)
from onnxmesh.runtime.host import HostCommunicator
from onnxmesh.runtime.mesh import Mesh

T = TypeVar("T")
Job = Callable[[], None]

_GRACE = 5.0
"""Seconds that the other ranks get, at most, to end after one has failed."""


def run_ranks(mesh: Mesh, fn: Callable[[Communicator], T], timeout: float = 60.0) -> list[T]:
    """Run `fn` once per rank, each in a thread of its own, and return the results by rank.

    `timeout` bounds, in seconds, how long a rank waits at one collective for the others.

    Raises the error of the first rank that failed, with the rank in its `rank` attribute and in a note;
    the other ranks end with `PeerFailed` at their next collective. Ranks that do not come together are
    a `CollectiveTimeout` or a `CollectiveMismatch`.
    """
    with ThreadRanks(mesh, timeout) as ranks:
        return ranks.run(fn)


class ThreadRanks:
    """The threads of a mesh's ranks, kept from one `run` to the next. Close it, or use it in a `with`."""

    def __init__(self, mesh: Mesh, timeout: float = 60.0) -> None:
        self.mesh = mesh
        self.timeout = timeout
        self._meeting = _Meeting(timeout)
        self._communicators = [ThreadCommunicator(mesh, rank, self._meeting) for rank in range(mesh.size)]
        self._jobs: list[SimpleQueue[Job | None]] = [SimpleQueue() for _ in range(mesh.size)]
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        for rank, jobs in enumerate(self._jobs):
            threading.Thread(target=_work, args=(jobs,), name=f"onnxmesh-rank-{rank}", daemon=True).start()
        self._stop = weakref.finalize(self, _stop, self._jobs)

    def communicator(self, rank: int) -> Communicator:
        """The communicator of one rank, to be used only inside `run`."""
        return self._communicators[rank]

    def run(self, fn: Callable[[Communicator], T]) -> list[T]:
        """Run `fn` on every rank at once and return the results by rank; see `run_ranks` for the errors.

        Raises RuntimeError if the ranks are closed, or still at work on an earlier `run`.
        """
        self._begin()
        results: dict[int, T] = {}
        for rank, jobs in enumerate(self._jobs):
            jobs.put(partial(self._do, fn, rank, results))
        try:
            self._wait()
        except BaseException as error:  # Ctrl-C, above all
            self._meeting.fail(-1, error)
            raise
        failure = self._meeting.failure
        if failure is not None:
            raise _marked(*failure)
        return [results[rank] for rank in range(self.mesh.size)]

    def close(self) -> None:
        """End the threads, once they have finished what they are doing. May be called again."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        with self._changed:
            if not self._stop.alive:
                raise RuntimeError("these ranks are closed")
            if self._busy:
                names = ", ".join(map(str, sorted(self._busy)))
                raise RuntimeError(f"an earlier run is still going on (rank {names})")
            self._busy.update(range(self.mesh.size))
        self._meeting.reset()
        for communicator in self._communicators:
            communicator.reset()

    def _do(self, fn: Callable[[Communicator], T], rank: int, results: dict[int, T]) -> None:
        communicator = self._communicators[rank]
        try:
            results[rank] = fn(communicator)
        except BaseException as error:
            communicator.abort(error)
        with self._changed:
            self._busy.discard(rank)
            self._changed.notify_all()

    def _wait(self) -> None:
        """Until all ranks have ended; after a failure, only for a short time."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy or self._meeting.failure is not None)
            self._changed.wait_for(lambda: not self._busy, min(self.timeout, _GRACE))


class ThreadCommunicator(HostCommunicator):
    """One rank of a `ThreadRanks`."""

    def __init__(self, mesh: Mesh, rank: int, meeting: _Meeting) -> None:
        super().__init__(mesh, rank)
        self._meeting = meeting

    def exchange(self, call: Call, parcels: Parcels, sources: Collection[int]) -> Parcels:
        here = call.group.index(self.rank)
        rendezvous = self._meeting.rendezvous(call.group)
        arrived = rendezvous.meet(here, call, _copies(parcels))
        return {source: arrived[source][here] for source in sources}

    def reset(self) -> None:
        """Count collectives from 0 again."""
        self._sequence.clear()

    def abort(self, error: BaseException) -> None:
        self._meeting.fail(self.rank, error)


class _Meeting:
    """What the ranks of one mesh share: a rendezvous for each group, and the first failure."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.failure: tuple[int, BaseException] | None = None
        self._lock = threading.Lock()
        self._rendezvous: dict[tuple[int, ...], _Rendezvous] = {}

    def reset(self) -> None:
        with self._lock:
            self.failure = None
            self._rendezvous.clear()

    def rendezvous(self, group: tuple[int, ...]) -> _Rendezvous:
        with self._lock:
            if group not in self._rendezvous:
                self._rendezvous[group] = _Rendezvous(self, group)
            return self._rendezvous[group]

    def fail(self, rank: int, error: BaseException) -> None:
        """Note the failure, if it is the first, and wake every rank that waits."""
        with self._lock:
            self.failure = self.failure or (rank, error)
            waiting = list(self._rendezvous.values())
        for rendezvous in waiting:
            rendezvous.wake()

    def peer_failed(self) -> PeerFailed:
        assert self.failure is not None
        rank, error = self.failure
        return PeerFailed(rank, f"{type(error).__name__}: {error}")


class _Round:
    """One exchange of a group: who has arrived, with what."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.parcels: dict[int, Parcels] = {}


class _Rendezvous:
    """Where the ranks of one group meet, round after round.

    A fast rank may enter the next round while slow ones still leave the last: they hold rounds apart.
    """

    def __init__(self, meeting: _Meeting, group: tuple[int, ...]) -> None:
        self._meeting = meeting
        self._group = group
        self._changed = threading.Condition()
        self._entered = [0] * len(group)
        self._rounds: dict[int, _Round] = {}

    def meet(self, here: int, call: Call, parcels: Parcels) -> Mapping[int, Parcels]:
        """Leave `parcels` for the others, wait until all have come, and return what each has left."""
        with self._changed:
            this = self._enter(here, call, parcels)
            if len(this.parcels) == len(self._group):
                del self._rounds[self._entered[here] - 1]
                self._changed.notify_all()
            else:
                self._wait(this, call)
        return this.parcels

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _enter(self, here: int, call: Call, parcels: Parcels) -> _Round:
        this = self._rounds.setdefault(self._entered[here], _Round())
        self._entered[here] += 1
        position, first = next(iter(this.calls.items()), (here, call))
        if call != first:
            rank, peer = self._group[here], self._group[position]
            raise CollectiveMismatch(f"rank {rank} is at {call}, but rank {peer} is at {first}")
        this.calls[here] = call
        this.parcels[here] = parcels
        return this

    def _wait(self, this: _Round, call: Call) -> None:
        def complete() -> bool:
            return len(this.parcels) == len(self._group)

        self._changed.wait_for(lambda: complete() or self._meeting.failure is not None, self._meeting.timeout)
        if complete():
            return
        if self._meeting.failure is not None:
            raise self._meeting.peer_failed()
        missing = [rank for position, rank in enumerate(self._group) if position not in this.parcels]
        raise CollectiveTimeout(call, missing, self._meeting.timeout)


def _copies(parcels: Parcels) -> Parcels:
    """Copies that the other ranks may read at leisure; an array that goes to several is copied once."""
    own = {id(array): np.array(array, order="C") for array in {id(a): a for a in parcels.values()}.values()}
    return {position: own[id(array)] for position, array in parcels.items()}


def _marked(rank: int, error: BaseException) -> BaseException:
    with suppress(AttributeError):
        error.rank = rank  # type: ignore[attr-defined]
    error.add_note(f"raised on rank {rank}")
    return error


def _work(jobs: SimpleQueue[Job | None]) -> None:
    """A rank's thread: do the jobs until there is a None. It holds no `ThreadRanks` while it waits."""
    while (job := jobs.get()) is not None:
        job()
        del job


def _stop(jobs: list[SimpleQueue[Job | None]]) -> None:
    for queue in jobs:
        queue.put(None)
