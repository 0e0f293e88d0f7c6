"""Ranks as MPI processes, through mpi4py: plans on CPU hosts, on one machine or many.

Everything is sent from rank to rank as bytes, each piece after a header that says what it belongs to.
So every dtype works, reductions run in rank order, a rank that is missing has a name, and a group needs
no communicator of its own.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from onnxmesh.runtime.comm import Array, Call, CollectiveMismatch, CollectiveTimeout, Parcels
from onnxmesh.runtime.host import HostCommunicator
from onnxmesh.runtime.mesh import Mesh

_HEADER, _BODY = 1, 2  # message tags
_SPIN = 1e-3  # seconds of busy polling before the rank sleeps between polls
_NAP = 1e-4


_FORWARDING = 0.3
"""Seconds that mpirun gets to pass on the last line; on a busy host an abort overtakes it."""


class MpiCommunicator(HostCommunicator):
    """This process's rank in COMM_WORLD, which must have as many ranks as the mesh.

    Use it in a `with` block, so that an exception on one rank ends all of them: MPI itself would let
    them wait for ever. For the same reason a timeout aborts the whole job.

    Raises ImportError if mpi4py or an MPI library is missing, and ValueError if the number of
    processes is not the size of the mesh.
    """

    def __init__(self, mesh: Mesh, timeout: float = 60.0) -> None:
        self._mpi = _import_mpi()
        world = self._mpi.COMM_WORLD
        if world.size != mesh.size:
            raise ValueError(
                f"mesh {mesh} has {mesh.size} ranks, but MPI started {world.size}: use mpirun -n {mesh.size}"
            )
        super().__init__(mesh, world.rank)
        self.timeout = timeout
        self._world = world.Dup()  # our messages never meet those of other libraries

    def exchange(self, call: Call, parcels: Parcels, sources: Collection[int]) -> Parcels:
        here = call.group.index(self.rank)
        ranks = call.group
        sends = [self._send(call, ranks[to], parcel) for to, parcel in parcels.items() if to != here]
        receives = {
            source: _Receive(self._mpi, self._world, ranks[source], call) for source in sources if source != here
        }
        try:
            self._complete(call, [*sends, *receives.values()])
        except (CollectiveTimeout, CollectiveMismatch) as error:
            self.abort(error)
            raise
        return {source: parcels[here] if source == here else receives[source].array for source in sources}

    def close(self) -> None:
        if self._world != self._mpi.COMM_NULL:
            self._world.Free()

    def abort(self, error: BaseException) -> None:
        """Say in one line on stderr what failed, and end all processes with its exit code."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        sys.stdout.flush()
        print(f"onnxmesh: rank {self.rank} failed: {text}{place}", file=sys.stderr, flush=True)
        time.sleep(_FORWARDING)
        self._mpi.COMM_WORLD.Abort(getattr(error, "exit_code", 1))

    def _send(self, call: Call, peer: int, parcel: Array) -> _Send:
        parcel = np.asarray(parcel, order="C")
        header = json.dumps({"call": str(call), "shape": parcel.shape}).encode()
        return _Send(
            peer,
            self._world.Isend([header, self._mpi.BYTE], dest=peer, tag=_HEADER),
            self._world.Isend([_bytes(parcel), self._mpi.BYTE], dest=peer, tag=_BODY),
        )

    def _complete(self, call: Call, transfers: Sequence[_Send | _Receive]) -> None:
        """Advance the transfers until all are done. Raises CollectiveTimeout, CollectiveMismatch."""
        start = time.monotonic()
        while transfers := [transfer for transfer in transfers if not transfer.advance()]:
            elapsed = time.monotonic() - start
            if elapsed > self.timeout:
                raise CollectiveTimeout(call, sorted({transfer.peer for transfer in transfers}), self.timeout)
            time.sleep(0 if elapsed < _SPIN else _NAP)


class _Send:
    """A header and a body on their way to a peer. The requests keep their buffers alive."""

    def __init__(self, peer: int, *requests: Any) -> None:
        self.peer = peer
        self._requests = requests

    def advance(self) -> bool:
        """Whether all of it has been taken over."""
        return all(request.Test() for request in self._requests)


class _Receive:
    """A header, then a body, awaited from a peer; `array` is the body."""

    def __init__(self, mpi: Any, world: Any, peer: int, call: Call) -> None:
        self.peer = peer
        self.array: Array = None
        self._mpi = mpi
        self._world = world
        self._call = call
        self._request: Any = None

    def advance(self) -> bool:
        """Whether the body is there. Raises CollectiveMismatch if the header is not of this call."""
        if self._request is None:
            header = self._header()
            if header is None:
                return False
            if header["call"] != str(self._call):
                raise CollectiveMismatch(
                    f"rank {self._world.rank} is at {self._call}, but rank {self.peer} is at {header['call']}"
                )
            self.array = np.empty(header["shape"], np.dtype(self._call.dtype))
            self._request = self._world.Irecv([_bytes(self.array), self._mpi.BYTE], source=self.peer, tag=_BODY)
        return bool(self._request.Test())

    def _header(self) -> Any:
        status = self._mpi.Status()
        message = self._world.Improbe(source=self.peer, tag=_HEADER, status=status)
        if message is None:
            return None
        text = bytearray(status.Get_count(self._mpi.BYTE))
        message.Recv([text, self._mpi.BYTE])
        return json.loads(text)


def _bytes(array: Array) -> Array:
    """The bytes of a contiguous array, as a view."""
    return array.reshape(-1).view(np.uint8)


def _import_mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library was found
        raise ImportError(f"MPI is not available ({error}): pip install 'onnxmesh[mpi]'") from error
    return MPI
