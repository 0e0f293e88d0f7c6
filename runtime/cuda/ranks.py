"""The ranks of a session that controls them: one process for each GPU of this host.

A rank is `python -m onnxmesh.runtime.cuda.worker`, started afresh and never forked, since CUDA does not survive a
fork. Commands and arrays go through a socket of its own (see runtime/frames.py), inputs to rank 0 alone. This process
holds the ranks' store, so that they notice when it is gone.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from onnxmesh.runtime import frames
from onnxmesh.runtime.cuda.device import device_count
from onnxmesh.runtime.errors import InvalidArgument, PlanError, RunError
from onnxmesh.runtime.loading import LoadReport
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.recipe import Fetch
from onnxmesh.runtime.rendezvous import StoreServer
from onnxmesh.runtime.serialize import save

_ERRORS: Mapping[str, type[RunError] | type[PlanError]] = {
    "PlanError": PlanError,
    "InvalidArgument": InvalidArgument,
}
_WORKER = ("-m", "onnxmesh.runtime.cuda.worker")
_START = 600.0
"""Seconds that a rank may take besides the timeout to import its libraries, load its weights and prepare."""
_FIRST, _PREPARE = 2, 120.0
"""So many runs prepare what the later ones use, and may take so many seconds more."""
_LONG = 3600.0
"""Seconds for what takes many runs; within it each wait has the timeout."""
_END = 3.0
"""Seconds that ranks get to end by themselves."""


class ProcessRanks:
    """One process for every rank of a plan, each with its GPU. Close it, or use it in a `with`.

    Args:
        plan: what to run; a plan that is not in a folder is written to a temporary one.
        source: where the weights are.
        timeout: how many seconds ranks wait for each other.
        graph: whether they capture the program in a CUDA graph.

    Attributes:
        load_report: how fast the weights were loaded.

    Raises:
        RunError: there are too few GPUs, or a rank cannot start.
        PlanError: the weights cannot be read.
    """

    def __init__(self, plan: Plan, source: Fetch | str | Path, timeout: float, graph: bool = True) -> None:
        size = plan.mesh.size
        if device_count() < size:
            raise RunError(f"the plan is for {size} ranks, and this process sees {device_count()} GPUs", code="OM5202")
        self.timeout = timeout
        self._runs = 0
        self._store = StoreServer()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._stop = weakref.finalize(self, _stop, self._processes, self._sockets, self._store)
        try:
            with TemporaryDirectory(prefix="onnxmesh-") as temporary:
                folder, weights = _places(plan, source, Path(temporary))
                for rank in range(size):
                    self._start(rank, size)
                request = {"plan": str(folder), "weights": weights, "timeout": timeout, "graph": graph}
                answers = self._call([request] * size, within=_START + timeout)
            self.load_report = LoadReport.of_ranks(
                (int(header["nbytes"]), float(header["seconds"])) for header, _ in answers
            )
        except BaseException:
            self._stop()
            raise

    def run(self, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs for the inputs, all whole.

        Raises:
            RunError: a rank failed, ended or did not arrive in time; all ranks have ended then.
        """
        self._runs += 1
        longest = 2 * self.timeout + _END + (_PREPARE if self._runs <= _FIRST else 0.0)
        results = self._all({"run": list(names)}, feeds, longest)[0][1]
        return [results[name] for name in names]

    def call(self, command: frames.Header) -> list[frames.Header]:
        """Have all ranks obey a command that may take long; their answers, by rank. Raises as `run`."""
        return [answer for answer, _ in self._all(command, within=_LONG)]

    def _all(
        self, command: frames.Header, arrays: Mapping[str, np.ndarray] | None = None, within: float = 0
    ) -> list[tuple[frames.Header, frames.Arrays]]:
        if not self._stop.alive:
            raise RunError("the ranks have ended", code="OM5011")
        try:
            return self._call([command] * len(self._sockets), arrays, within)
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        """End the processes. May be called again."""
        self._stop()

    def _start(self, rank: int, size: int) -> None:
        ours, theirs = socket.socketpair()
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": self._store.port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        command = [sys.executable, *_WORKER, str(theirs.fileno())]
        with theirs:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process, which then ends them
                )
            )
        self._sockets.append(ours)

    def _call(
        self, headers: Sequence[frames.Header], arrays: Mapping[str, np.ndarray] | None = None, within: float = 0
    ) -> list[tuple[frames.Header, frames.Arrays]]:
        """Send every rank its command, rank 0 with `arrays`; what they answer, by rank."""
        for rank, (connection, header) in enumerate(zip(self._sockets, headers)):
            try:
                frames.send(connection, header, arrays if rank == 0 else None)
            except OSError:
                raise self._ended(rank) from None
        answers: dict[int, tuple[frames.Header, frames.Arrays]] = {}
        end = time.monotonic() + (within or 2 * self.timeout + _END)
        with selectors.DefaultSelector() as selector:
            for rank, connection in enumerate(self._sockets):
                selector.register(connection, selectors.EVENT_READ, rank)
            while len(answers) < len(self._sockets):
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    missing = ", ".join(str(rank) for rank in range(len(self._sockets)) if rank not in answers)
                    raise RunError(
                        f"no answer from rank {missing}", hint="is it only slow? raise the timeout", code="OM5108"
                    )
                for key, _ in ready:
                    answers[key.data] = self._answer(key.data)
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self._sockets))]

    def _answer(self, rank: int) -> tuple[frames.Header, frames.Arrays]:
        """A rank's answer. Raises what the rank says went wrong."""
        try:
            frame = frames.receive(self._sockets[rank])
        except OSError:
            frame = None
        if frame is None:
            raise self._ended(rank)
        if "error" in frame[0]:
            if frame[0]["kind"] == "PeerFailed":  # a rank that died says nothing itself
                for other, process in enumerate(self._processes):
                    if process.poll() is not None:
                        raise self._ended(other)
            kind = _ERRORS.get(str(frame[0]["kind"]), RunError)
            raise kind(str(frame[0]["error"]), hint=str(frame[0]["hint"]), code=str(frame[0]["code"]))
        return frame

    def _ended(self, rank: int) -> RunError:
        try:
            code = self._processes[rank].wait(1.0)
        except subprocess.TimeoutExpired:
            return RunError(f"rank {rank} does not answer any more", code="OM5108")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return RunError(f"the process of rank {rank} {how}", code="OM5108")


def _places(plan: Plan, source: Fetch | str | Path, temporary: Path) -> tuple[Path, str]:
    """The folders of the plan and of its weights; what is only in memory is written to `temporary`."""
    folder = Path(plan.source) if isinstance(plan.source, str | Path) else None
    if not isinstance(source, str | Path):
        save(plan, temporary / "run.plan", source)
        return temporary / "run.plan", str(temporary / "run.plan")
    if folder is None:
        folder = temporary / "run.plan"
        save(plan, folder)
    return folder, str(source)


def _stop(processes: list[subprocess.Popen[bytes]], sockets: list[socket.socket], store: StoreServer) -> None:
    """Ranks end when their socket does; those that do not are killed."""
    for connection in sockets:
        connection.close()
    end = time.monotonic() + _END
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    store.close()
