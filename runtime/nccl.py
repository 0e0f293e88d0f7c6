"""Ranks as processes with a GPU each: the collectives over NCCL, on CuPy arrays.

Everything is enqueued on CuPy's current stream and allocated from its current pool, so it can be captured in a CUDA
graph. NCCL has no all-to-all, gather and scatter: they are grouped sends and receives, as its guide says
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/p2p.html). Data is moved as bytes.

NCCL's minimum and maximum of floats lose NaN, so these are gathered and reduced here. Sums of float16 and bfloat16
are NCCL's own: every rank gets the same bits, but the order of summation is not the group's.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from itertools import combinations
from typing import Any

from onnxmesh.runtime.comm import Array, Axis, Communicator, PeerFailed, Scoped, check_reduction, resolve_group
from onnxmesh.runtime.cuda.device import import_cupy, import_nccl
from onnxmesh.runtime.dtypes import is_narrow
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.rendezvous import World, no_sign

_TYPES = {
    **{"float64": "FLOAT64", "float32": "FLOAT32", "float16": "FLOAT16", "bfloat16": "BFLOAT16"},
    **{"int64": "INT64", "int32": "INT32", "int8": "INT8", "uint8": "UINT8", "bool": "UINT8"},
}
_UFUNCS = {"sum": "add", "avg": "add", "prod": "multiply", "min": "minimum", "max": "maximum"}
_GRACE = 5.0
"""Seconds from the moment the communicators are aborted to the moment the process is ended."""


class NcclGroups:
    """NCCL's communicators of one process, one for each group of ranks, made when first used.

    A watchdog aborts them all when another rank fails, when `guard` lasts too long, or when what was `expect`ed does
    not come. The process is ended if it is inside `attend` or `guard` some seconds later: nobody survives a failed
    run for long.

    Args:
        world: all ranks.
        given: communicators that are there already, by their groups; no others are made then.
        kept: one of them that stays open when this is closed.

    Attributes:
        where: says how far the GPU has come, for the message when it comes no further.
        on_abort: called when all communication is to end: whatever else waits for other ranks stops waiting.
    """

    def __init__(self, world: World, given: Mapping[tuple[int, ...], Any] | None = None, kept: Any = None) -> None:
        self.world = world
        self.failure: Exception | None = None
        self.where: Callable[[], str] = lambda: "for its GPU"
        self.on_abort: list[Callable[[], None]] = []
        self._communicators: dict[tuple[int, ...], Any] = dict(given or {})
        self._given, self._kept = given is not None, kept
        self._deadline: tuple[float, float] | None = None
        self._inside = 0
        self._expected: deque[tuple[Callable[[], bool], float]] = deque()
        self._closed = threading.Event()
        if world.size > 1:
            threading.Thread(target=self._watch, name="onnxmesh-watchdog", daemon=True).start()
        if world.store is not None:
            world.store.watch(self._hear)

    def of(self, group: tuple[int, ...]) -> Any:
        """The communicator of `group`; all its ranks ask for it together.

        Raises:
            PeerFailed: another rank has failed.
            RunError: NCCL cannot connect the ranks.
        """
        self.check()
        if group not in self._communicators:
            self._communicators[group] = self._connect(group)
        return self._communicators[group]

    def check(self) -> None:
        """Raise what the communicators were aborted for, if they were."""
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def attend(self) -> Iterator[None]:
        """Within it this process works on what all ranks do together, and ends with them."""
        self.check()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @contextmanager
    def guard(self, seconds: float = 0.0) -> Iterator[None]:
        """Within it the other ranks are waited for, and no longer than `seconds` (or the world's timeout).

        Inside another guard it is that one which counts.
        """
        with self.attend():
            outer, seconds = self._deadline, seconds or self.world.timeout
            if outer is None:
                self._deadline = time.monotonic() + seconds, seconds
            try:
                yield
            except Exception as error:
                if self.failure is not None:  # what followed from it tells nobody anything
                    raise self.failure from error
                raise
            finally:
                self._deadline = outer
        self.check()

    def expect(self, done: Callable[[], bool]) -> None:
        """Abort unless `done()`, which is called from another thread, is true within the world's timeout."""
        if self.world.size > 1:
            self._expected.append((done, time.monotonic() + self.world.timeout))

    def abort(self, failure: Exception) -> None:
        """End all communication because of `failure`; what waits for it returns. One rank alone has nothing to end."""
        if self.world.size == 1 or self.failure is not None or self._closed.is_set():
            return
        self.failure = failure
        for stop in list(self.on_abort):
            stop()
        threading.Thread(target=self._end_process, args=(failure,), daemon=True).start()
        for communicator in list(self._communicators.values()):
            with suppress(Exception):
                communicator.abort()

    def close(self) -> None:
        """Let the communicators go; graphs that hold their work must be gone before. May be called again."""
        self._closed.set()
        if self.failure is None:
            for communicator in self._communicators.values():
                if communicator is not self._kept:
                    communicator.destroy()
        self._communicators.clear()

    def _connect(self, group: tuple[int, ...]) -> Any:
        store = self.world.store
        if self._given or store is None:
            raise RunError(
                f"there is no communicator for ranks {group} among those made from the given one", code="OM5111"
            )
        nccl = import_nccl()
        key, position = f"nccl/{','.join(map(str, group))}", group.index(self.world.rank)
        if position == 0:
            store.set(key, nccl.get_unique_id().hex())
        try:
            with self.guard():
                identity = bytes.fromhex(store.get(key, f"rank {group[0]}"))
                return nccl.NcclCommunicator(len(group), identity, position)
        except nccl.NcclError as error:
            raise RunError(f"NCCL cannot connect ranks {group}: {error}", code="OM5203") from error

    def _hear(self, failure: PeerFailed) -> None:
        if failure.rank != self.world.rank:  # its own it knows better
            self.abort(failure)

    def _watch(self) -> None:
        while not self._closed.wait(0.2) and self.failure is None:
            deadline, now = self._deadline, time.monotonic()
            if deadline is not None and now > deadline[0]:
                self._give_up(deadline[1])
            elif self._is_overdue(now):
                self._give_up(self.world.timeout)

    def _is_overdue(self, now: float) -> bool:
        while self._expected:
            done, deadline = self._expected[0]
            try:
                finished = done()
            except Exception:  # whoever waits for it is told
                finished = True
            if not finished:
                return now > deadline
            self._expected.popleft()
        return False

    def _give_up(self, seconds: float) -> None:
        text = f"rank {self.world.rank} waited {seconds:g} s {self.where()}"
        error = RunError(
            text,
            hint="another rank hangs or has left the program; if it is only slow, raise the timeout",
            code="OM5102",
        )
        silent = self.world.store.fail(error, waited=True) if self.world.store is not None else []
        if silent:
            error.args = (f"{text}; {no_sign(silent)}",)
        self.abort(error)

    def _end_process(self, failure: Exception) -> None:
        """NCCL's abort may itself hang."""
        time.sleep(_GRACE)
        while not self._closed.wait(0.2):
            if self._inside:
                print(f"error: rank {self.world.rank} ends: {failure.args[0]}", file=sys.stderr, flush=True)
                os._exit(getattr(failure, "exit_code", 1))


class NcclCommunicator(Scoped, Communicator):
    """This process's rank. Leaving a `with` block closes it, or aborts it if an exception ended the block.

    Args:
        mesh: how the world's ranks are arranged.
        world: all ranks; None on a mesh of one.
        groups: the connections of another mesh of the same world, to share them.

    Raises ValueError if the mesh is of another size than the world.
    """

    def __init__(self, mesh: Mesh, world: World | None = None, groups: NcclGroups | None = None) -> None:
        self.groups = groups or NcclGroups(world or World())
        if mesh.size != self.groups.world.size:
            raise ValueError(f"mesh {mesh} has {mesh.size} ranks, the world {self.groups.world.size}")
        self.mesh = mesh
        self.rank = self.groups.world.rank
        self._xp = import_cupy()
        self._nccl: Any = import_nccl() if mesh.size > 1 else None

    @classmethod
    def wrap(cls, mesh: Mesh, communicator: Any, world: World | None = None, timeout: float = 60.0) -> NcclCommunicator:
        """This rank over an NCCL communicator of the caller's own, which holds all ranks of the mesh in order.

        All ranks call it together, while nothing is under way on `communicator`: it is split into the groups of the
        mesh's axes. It stays open when this is closed, but is aborted if a rank fails. Without a `world` ranks hear of
        each other's failures only by waiting in vain.

        Args:
            communicator: a cupy.cuda.nccl.NcclCommunicator.
            timeout: seconds that ranks wait for each other; a given world has its own.
        """
        rank = int(communicator.rank_id())
        world = world or World.apart(rank, int(communicator.size()), int(communicator.device_id()), timeout)
        everyone = tuple(range(mesh.size))
        given = {everyone: communicator}
        axes = [axis for axis, size in mesh.axes if size > 1]
        for count in range(1, len(axes)):
            for some in combinations(axes, count):
                group = mesh.group(rank, some)
                given[group] = communicator.commSplit(group[0], group.index(rank))
        return cls(mesh, groups=NcclGroups(world, given, communicator))

    def on(self, mesh: Mesh) -> NcclCommunicator:
        """The same ranks as another mesh, over the same connections."""
        return NcclCommunicator(mesh, groups=self.groups)

    def all_reduce(self, x: Array, axis: Axis, op: str = "sum") -> Array:
        check_reduction(op, x.dtype.name)
        group, x = self._group(axis), self._xp.ascontiguousarray(x)
        if len(group) == 1:
            return x.copy()
        if not is_native(op, x):
            return self._reduced(op, self._gathered(x, group))
        out = self._xp.empty_like(x)
        if x.size:
            kind, operation = self.kinds(op, x)
            self.groups.of(group).allReduce(x.data.ptr, out.data.ptr, x.size, kind, operation, self._stream())
        return out

    def reduce_scatter(self, x: Array, axis: Axis, op: str = "sum", dim: int = 0) -> Array:
        check_reduction(op, x.dtype.name)
        group = self._group(axis)
        pieces = self._pieces(x, len(group), dim)
        if len(group) == 1:
            return pieces[0].copy()
        if not is_native(op, x):
            return self._reduced(op, self._exchanged(pieces, group))
        out = self._xp.empty_like(pieces[0])
        if out.size:
            kind, operation = self.kinds(op, x)
            communicator = self.groups.of(group)
            communicator.reduceScatter(pieces.data.ptr, out.data.ptr, out.size, kind, operation, self._stream())
        return out

    def all_gather(self, x: Array, axis: Axis, dim: int = 0) -> Array:
        _check_dim(x, dim)
        return self._joined(self._gathered(self._xp.ascontiguousarray(x), self._group(axis)), dim)

    def all_to_all(self, x: Array, axis: Axis, split_dim: int = 0, concat_dim: int = 0) -> Array:
        _check_dim(x, concat_dim)
        group = self._group(axis)
        return self._joined(self._exchanged(self._pieces(x, len(group), split_dim), group), concat_dim)

    def broadcast(self, x: Array, axis: Axis, root: int = 0) -> Array:
        group, x = self._group(axis), self._xp.ascontiguousarray(x)
        self._is_root(group, root)
        out = x.copy()
        if len(group) > 1 and x.size:
            kind = self._nccl.NCCL_UINT8
            self.groups.of(group).broadcast(x.data.ptr, out.data.ptr, x.nbytes, kind, root, self._stream())
        return out

    def reduce(self, x: Array, axis: Axis, op: str = "sum", root: int = 0) -> Array | None:
        check_reduction(op, x.dtype.name)
        group, x = self._group(axis), self._xp.ascontiguousarray(x)
        is_root = self._is_root(group, root)
        if len(group) > 1 and x.size and is_native(op, x):
            out, (kind, operation) = self._xp.empty_like(x), self.kinds(op, x)
            communicator = self.groups.of(group)
            communicator.reduce(x.data.ptr, out.data.ptr, x.size, kind, operation, root, self._stream())
            return out if is_root else None
        pieces = self._collected(x, group, root)
        return None if pieces is None else self._reduced(op, pieces)

    def gather(self, x: Array, axis: Axis, root: int = 0, dim: int = 0) -> Array | None:
        _check_dim(x, dim)
        group = self._group(axis)
        self._is_root(group, root)
        pieces = self._collected(self._xp.ascontiguousarray(x), group, root)
        return None if pieces is None else self._joined(pieces, dim)

    def scatter(self, x: Array | None, axis: Axis, root: int = 0, dim: int = 0, like: Array | None = None) -> Array:
        group = self._group(axis)
        is_root = self._is_root(group, root)
        given = x if is_root else like
        if given is None:
            raise ValueError("scatter needs x on the root, and like (shape and dtype) on the other ranks")
        if not is_root:
            piece = self._xp.empty(given.shape, given.dtype)
            self._transfer(group, {}, {root: piece})
            return piece
        pieces = self._pieces(given, len(group), dim)
        self._transfer(group, {i: piece for i, piece in enumerate(pieces) if i != root}, {})
        return pieces[root].copy()

    def shift(self, x: Array, axis: Axis, offset: int = 1) -> Array:
        group, x = self._group(axis), self._xp.ascontiguousarray(x)
        size, here = len(group), group.index(self.rank)
        if offset % size == 0:
            return x.copy()
        out = self._xp.empty_like(x)
        self._transfer(group, {(here + offset) % size: x}, {(here - offset) % size: out})
        return out

    def barrier(self, axis: Axis | None = None) -> None:
        everyone = tuple(range(self.mesh.size))
        self.all_reduce(self._xp.zeros(1, self._xp.uint8), everyone if axis is None else axis)
        with self.groups.guard():
            self._xp.cuda.get_current_stream().synchronize()

    def close(self) -> None:
        self.groups.close()

    def abort(self, error: BaseException) -> None:
        """Tell the other ranks, and end this one's communication."""
        store = self.groups.world.store
        if store is not None and not isinstance(error, PeerFailed):
            store.fail(error)
        self.groups.abort(error if isinstance(error, Exception) else RunError(repr(error), code="OM5110"))

    def _group(self, axis: Axis) -> tuple[int, ...]:
        return resolve_group(self.mesh, self.rank, axis)

    def _is_root(self, group: tuple[int, ...], root: int) -> bool:
        if not 0 <= root < len(group):
            raise ValueError(f"root {root} is not a position in the group of ranks {group}")
        return group[root] == self.rank

    def _stream(self) -> int:
        return int(self._xp.cuda.get_current_stream().ptr)

    def kinds(self, op: str, x: Array) -> tuple[int, int]:
        """NCCL's numbers for the dtype and the reduction."""
        return getattr(self._nccl, f"NCCL_{_TYPES[x.dtype.name]}"), getattr(self._nccl, f"NCCL_{op.upper()}")

    def _pieces(self, x: Array, count: int, dim: int) -> Array:
        """x cut along `dim` into pieces, one after another in memory: [count, *piece]."""
        _check_dim(x, dim)
        if x.shape[dim] % count:
            raise ValueError(f"dim {dim} of shape {list(x.shape)} does not divide among {count} ranks")
        dim %= x.ndim
        cut = x.reshape(*x.shape[:dim], count, x.shape[dim] // count, *x.shape[dim + 1 :])
        return self._xp.ascontiguousarray(self._xp.moveaxis(cut, dim, 0))

    def _joined(self, pieces: Array, dim: int) -> Array:
        """The inverse of `_pieces`."""
        dim %= pieces.ndim - 1
        whole = self._xp.ascontiguousarray(self._xp.moveaxis(pieces, 0, dim))
        return (
            whole.reshape(*whole.shape[:dim], -1, *whole.shape[dim + 2 :]) if whole.size else self._empty(pieces, dim)
        )

    def _empty(self, pieces: Array, dim: int) -> Array:
        shape = list(pieces.shape[1:])
        shape[dim] *= len(pieces)
        return self._xp.empty(shape, pieces.dtype)

    def _reduced(self, op: str, pieces: Array) -> Array:
        """The pieces [count, ...] reduced from first to last, narrow floats in float32."""
        xp = self._xp
        parts = [piece.astype(xp.float32) if is_narrow(pieces.dtype) else piece for piece in pieces]
        total = reduce(getattr(xp, _UFUNCS[op]), parts)
        return (total / len(parts) if op == "avg" else total).astype(pieces.dtype)

    def _gathered(self, x: Array, group: tuple[int, ...]) -> Array:
        """All ranks' x: [count, *x]."""
        out = self._xp.empty((len(group), *x.shape), x.dtype)
        if len(group) == 1:
            out[0] = x
        elif x.size:
            kind = self._nccl.NCCL_UINT8
            self.groups.of(group).allGather(x.data.ptr, out.data.ptr, x.nbytes, kind, self._stream())
        return out

    def _exchanged(self, pieces: Array, group: tuple[int, ...]) -> Array:
        """What every rank has for this one, where `pieces` are for every rank: both [count, *piece]."""
        out, here = self._xp.empty_like(pieces), group.index(self.rank)
        out[here] = pieces[here]
        others = [i for i in range(len(group)) if i != here]
        self._transfer(group, {i: pieces[i] for i in others}, {i: out[i] for i in others})
        return out

    def _collected(self, x: Array, group: tuple[int, ...], root: int) -> Array | None:
        """On the root all ranks' x: [count, *x]."""
        if group[root] != self.rank:
            self._transfer(group, {root: x}, {})
            return None
        out = self._xp.empty((len(group), *x.shape), x.dtype)
        out[root] = x
        self._transfer(group, {}, {i: out[i] for i in range(len(group)) if i != root})
        return out

    def _transfer(self, group: tuple[int, ...], sends: dict[int, Array], receives: dict[int, Array]) -> None:
        """Send to and receive from positions of the group, all at once."""
        parcels: Sequence[Array] = [*sends.values(), *receives.values()]
        if not parcels or not parcels[0].size:
            return
        communicator, kind, stream = self.groups.of(group), self._nccl.NCCL_UINT8, self._stream()
        self._nccl.groupStart()
        try:
            for position, parcel in sends.items():
                communicator.send(parcel.data.ptr, parcel.nbytes, kind, position, stream)
            for position, parcel in receives.items():
                communicator.recv(parcel.data.ptr, parcel.nbytes, kind, position, stream)
        finally:
            self._nccl.groupEnd()


def is_native(op: str, x: Array) -> bool:
    """Whether NCCL's own reduction means what REDUCTIONS says."""
    is_float = x.dtype.kind == "f" or is_narrow(x.dtype)
    return x.dtype.name in _TYPES and not (is_float and op in ("min", "max"))


def _check_dim(x: Array, dim: int) -> None:
    if not -len(x.shape) <= dim < len(x.shape):
        raise ValueError(f"no dim {dim} in shape {list(x.shape)}")
