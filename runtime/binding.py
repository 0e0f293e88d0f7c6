"""Bindings: a session run again and again on fixed memory of the caller's, as ONNX Runtime's I/O binding does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.errors import InvalidArgument
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.placement import Replicate
from onnxmesh.runtime.plan import Port

if TYPE_CHECKING:
    from onnxmesh.runtime.comm import Communicator
    from onnxmesh.runtime.session import Session

Memory = tuple[list[Array | None], list[Array | None]]
"""What an engine reads and writes in place, in the order of the program's inputs and outputs; None: its own memory."""


class Binding:
    """Memory that a session's program reads its inputs from and writes its outputs to. Made by `Session.bind`.

    The caller writes new values into the same arrays, and `run` does the rest. An array is used in place where what a
    rank needs of it is row-major there, and copied in each run where it is not.

    A session uses one binding at a time: another one in between, or `Session.run`, means to prepare anew.

    Attributes:
        inputs: the arrays given, by name, as NumPy's or CuPy's.
        outputs: for every output the array given, or one in the session's memory that is good until the next run. As
            one rank of several it is this rank's shard where the plan leaves an output sharded.

    Raises:
        InvalidArgument: an output of the wrong dtype or shape, or on another device.
    """

    def __init__(self, session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Any]) -> None:
        self._session = session
        self._ports = session.plan.programs[0].outputs
        self.inputs = dict(inputs)
        self.outputs: dict[str, Array] = {}
        self._targets = {port.name: self._target(port, outputs.get(port.name)) for port in self._ports}
        with session.device.scope():
            self._inputs = {rank: self._pieces(rank) for rank in session.engines}

    def run(self, stream: Any = None) -> Mapping[str, Array]:
        """Run on what the inputs hold now, and return `outputs`.

        Args:
            stream: on a GPU a CUDA stream (CuPy's, torch's, or a pointer) that orders this run with the caller's
                work; `run` then returns at once. Without it the run follows what is on CuPy's current stream, and is
                complete on return.

        Raises:
            RunError: a rank failed or did not arrive in time.
        """
        session = self._session
        session.check_open()
        self.prepare()
        if not session.on_threads(self._step, stream):
            session.as_rank(self._step, stream)
            return self.outputs
        for port in self._ports:
            if self._targets[port.name] is not None and not self._is_direct(0, port):
                self.outputs[port.name][...] = session.joined(port)
        return self.outputs

    def prepare(self) -> None:
        """Have the session use this memory, if it uses another; all ranks call it together."""
        session = self._session
        if session.bound is self:
            return
        with session.device.running(first=True):
            session.use(self)
        first = min(session.engines)
        for port in self._ports:
            target = self._targets[port.name]
            self.outputs[port.name] = session.engines[first].array(port.buffer) if target is None else target

    def memory(self, rank: int) -> Memory:
        """What a rank's engine is to use."""
        own = [self._targets[port.name] if self._is_direct(rank, port) else None for port in self._ports]
        return list(self._inputs[rank].values()), own

    def _step(self, comm: Communicator) -> None:
        session, engine = self._session, self._session.engines[comm.rank]
        for port in session.plan.programs[0].inputs:
            memory, piece = self._inputs[comm.rank][port.name], session.local(comm.rank, port, self.inputs[port.name])
            if not _is_same(memory, piece):
                _copy(memory, piece)
        engine.run_bound()
        if session.is_one_rank:
            for port in self._ports:
                target = self._targets[port.name]
                if target is not None and not self._is_direct(comm.rank, port):
                    target[...] = engine.array(port.buffer)

    def _pieces(self, rank: int) -> dict[str, Array]:
        """A rank's inputs: where the caller's array holds them, or else in memory of their own."""
        session, found = self._session, {}
        for port in session.plan.programs[0].inputs:
            piece = session.local(rank, port, self.inputs[port.name])
            again = session.local(rank, port, self.inputs[port.name])
            usable = piece.flags.c_contiguous and session.device.holds(piece) and _is_same(piece, again)
            found[port.name] = piece if usable else session.device.xp.empty(piece.shape, piece.dtype)
        return found

    def _target(self, port: Port, value: Any) -> Array | None:
        """Where an output goes; None: it stays where it is made."""
        session = self._session
        if session.is_one_rank:
            own = session.plan.programs[0].buffers[port.buffer].shape
        else:
            own = port.shape
        if value is None:
            is_made = session.is_one_rank or self._is_whole(port)
            return None if is_made else np.empty(port.shape, dtype(port.dtype))
        array = session.checked(port, value, "output")
        if not session.device.holds(array) or array.shape != own:
            what = f"has the shape {list(own)} on this rank" if array.shape != own else "is made on the GPU"
            raise InvalidArgument(f"output {port.name!r} {what}: the array given does not fit", code="OM5003")
        return array

    def _is_direct(self, rank: int, port: Port) -> bool:
        """Whether a rank writes an output straight into the array given. Of several ranks here the first one does."""
        target = self._targets[port.name]
        if target is None or not target.flags.c_contiguous:
            return False
        return self._session.is_one_rank or (rank == 0 and self._is_whole(port))

    def _is_whole(self, port: Port) -> bool:
        """Whether every rank makes all of an output."""
        mesh = self._session.plan.mesh
        return all(isinstance(placement, Replicate) or mesh.axis_size(axis) == 1 for axis, placement in port.spec)


def _address(array: Array) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def _is_same(one: Array, other: Array) -> bool:
    """Whether two arrays of one shape and dtype are the same memory."""
    return (
        isinstance(one, np.ndarray) == isinstance(other, np.ndarray)
        and _address(one) == _address(other)
        and one.strides == other.strides
    )


def _copy(target: Array, source: Array) -> None:
    if isinstance(source, np.ndarray) and not isinstance(target, np.ndarray):
        target.set(np.ascontiguousarray(source))
    else:
        target[...] = source
