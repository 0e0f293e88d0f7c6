"""The collectives on NumPy arrays, written once over a single exchange of parcels."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from onnxmesh.runtime.comm import (
    Array,
    Axis,
    Call,
    Communicator,
    Parcels,
    Scoped,
    check_reduction,
    reduce_arrays,
    resolve_group,
)
from onnxmesh.runtime.mesh import Mesh


class HostCommunicator(Scoped, Communicator):
    """The collectives on NumPy arrays, all made of one `exchange` that an implementation provides.

    Leaving a `with` block closes the communicator, or aborts it if an exception ended the block.
    """

    SPLIT_FROM = 1 << 14
    """An all-reduce of this many elements or more is cut up, so that every rank reduces 1/n of it."""

    def __init__(self, mesh: Mesh, rank: int) -> None:
        mesh.coordinate(rank)  # raises for a rank outside the mesh
        self.mesh = mesh
        self.rank = rank
        self._sequence: Counter[tuple[int, ...]] = Counter()
        self._groups: dict[Axis, tuple[int, ...]] = {}

    @abstractmethod
    def exchange(self, call: Call, parcels: Parcels, sources: Collection[int]) -> Parcels:
        """Meet the others: give `parcels[i]` to position i, return the parcel of each of `sources`.

        Positions may include the caller's own. The parcels may be views of arrays that the caller
        overwrites afterwards; the result is only read, and may be shared between ranks.
        """

    def group(self, axis: Axis) -> tuple[int, ...]:
        """The ranks that take part in a collective over `axis`, in the order of their positions."""
        if axis not in self._groups:
            self._groups[axis] = resolve_group(self.mesh, self.rank, axis)
        return self._groups[axis]

    def all_reduce(self, x: Array, axis: Axis, op: str = "sum") -> Array:
        check_reduction(op, x.dtype.name)
        call = self._call("all_reduce", axis, x, op=op)
        size = len(call.group)
        if x.size < self.SPLIT_FROM:
            return reduce_arrays(op, self._swap(call, [x] * size))
        part = reduce_arrays(op, self._swap(call, np.array_split(x.reshape(-1), size)))
        return np.concatenate(self._swap(call, [part] * size)).reshape(x.shape)

    def reduce_scatter(self, x: Array, axis: Axis, op: str = "sum", dim: int = 0) -> Array:
        check_reduction(op, x.dtype.name)
        pieces = _split(x, len(self.group(axis)), dim)
        return reduce_arrays(op, self._swap(self._call("reduce_scatter", axis, x, op=op, dim=dim), pieces))

    def all_gather(self, x: Array, axis: Axis, dim: int = 0) -> Array:
        _check_dim(x, dim)
        call = self._call("all_gather", axis, x, dim=dim)
        return np.concatenate(self._swap(call, [x] * len(call.group)), axis=dim)

    def all_to_all(self, x: Array, axis: Axis, split_dim: int = 0, concat_dim: int = 0) -> Array:
        _check_dim(x, concat_dim)
        pieces = _split(x, len(self.group(axis)), split_dim)
        call = self._call("all_to_all", axis, x, split_dim=split_dim, concat_dim=concat_dim)
        return np.concatenate(self._swap(call, pieces), axis=concat_dim)

    def broadcast(self, x: Array, axis: Axis, root: int = 0) -> Array:
        is_root = self._is_root(axis, root)
        call = self._call("broadcast", axis, x, root=root)
        parcels = dict.fromkeys(range(len(call.group)), x) if is_root else {}
        return self._meet(call, parcels, [root])[root].copy()

    def reduce(self, x: Array, axis: Axis, op: str = "sum", root: int = 0) -> Array | None:
        check_reduction(op, x.dtype.name)
        is_root = self._is_root(axis, root)
        parts = self._collect(self._call("reduce", axis, x, op=op, root=root), x, root)
        return reduce_arrays(op, parts) if is_root else None

    def gather(self, x: Array, axis: Axis, root: int = 0, dim: int = 0) -> Array | None:
        _check_dim(x, dim)
        is_root = self._is_root(axis, root)
        parts = self._collect(self._call("gather", axis, x, root=root, dim=dim), x, root)
        return np.concatenate(parts, axis=dim) if is_root else None

    def scatter(self, x: Array | None, axis: Axis, root: int = 0, dim: int = 0, like: Array | None = None) -> Array:
        given = x if self._is_root(axis, root) else like
        if given is None:
            raise ValueError("scatter needs x on the root, and like (shape and dtype) on the other ranks")
        pieces = _split(given, len(self.group(axis)), dim) if given is x else []
        call = self._call("scatter", axis, pieces[0] if pieces else given, root=root, dim=dim)
        return self._meet(call, dict(enumerate(pieces)), [root])[root].copy()

    def shift(self, x: Array, axis: Axis, offset: int = 1) -> Array:
        call = self._call("shift", axis, x, offset=offset)
        size, here = len(call.group), call.group.index(self.rank)
        source = (here - offset) % size
        return self._meet(call, {(here + offset) % size: x}, [source])[source].copy()

    def barrier(self, axis: Axis | None = None) -> None:
        empty = np.empty(0, np.uint8)
        call = self._call("barrier", tuple(range(self.mesh.size)) if axis is None else axis, empty)
        self._swap(call, [empty] * len(call.group))

    def close(self) -> None:
        return None

    def _call(self, kind: str, axis: Axis, x: Array, **options: object) -> Call:
        group = self.group(axis)
        dtype = np.dtype(x.dtype)
        if dtype.hasobject or not dtype.isnative:
            raise TypeError(f"{kind} cannot send dtype {dtype!r}: only native numbers and bool")
        self._sequence[group] += 1
        return Call(kind, group, self._sequence[group] - 1, tuple(x.shape), dtype.name, tuple(options.items()))

    def _is_root(self, axis: Axis, root: int) -> bool:
        group = self.group(axis)
        if not 0 <= root < len(group):
            raise ValueError(f"root {root} is not a position in the group of ranks {group}")
        return group[root] == self.rank

    def _swap(self, call: Call, parcels: Sequence[Array]) -> list[Array]:
        """Every rank gives one parcel to every rank; what they gave this one, by position."""
        everyone = range(len(call.group))
        incoming = self._meet(call, dict(enumerate(parcels)), everyone)
        return [incoming[position] for position in everyone]

    def _collect(self, call: Call, x: Array, root: int) -> list[Array]:
        """Every rank gives `x` to the root; there, what they gave, by position."""
        sources = range(len(call.group)) if call.group[root] == self.rank else range(0)
        incoming = self._meet(call, {root: x}, sources)
        return [incoming[position] for position in sources]

    def _meet(self, call: Call, parcels: Parcels, sources: Collection[int]) -> Parcels:
        return parcels if len(call.group) == 1 else self.exchange(call, parcels, sources)


def _check_dim(x: Array, dim: int) -> None:
    if not -len(x.shape) <= dim < len(x.shape):
        raise ValueError(f"no dim {dim} in shape {list(x.shape)}")


def _split(x: Array, count: int, dim: int) -> list[Array]:
    _check_dim(x, dim)
    if x.shape[dim] % count:
        raise ValueError(f"dim {dim} of shape {list(x.shape)} does not divide among {count} ranks")
    return np.split(x, count, axis=dim)


class LoneCommunicator(HostCommunicator):
    """One simulated rank: the others are taken to send just what it sends, or zeros if it sends nothing.

    Shapes and dtypes of all results are right, which is enough to run one rank's program by itself.
    """

    SPLIT_FROM = 1 << 62

    def exchange(self, call: Call, parcels: Parcels, sources: Collection[int]) -> Parcels:
        here = call.group.index(self.rank)
        default = next(iter(parcels.values()), np.zeros(call.shape, np.dtype(call.dtype)))
        return dict.fromkeys(sources, parcels.get(here, default))

    def abort(self, error: BaseException) -> None:
        return None
