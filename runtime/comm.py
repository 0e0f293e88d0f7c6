"""Communicators: the collectives that the ranks of a mesh run together.

`Communicator` is the protocol; `REDUCTIONS` says which reduction is defined for which dtype;
`RecordingCommunicator` notes what is sent. docs/communicators.md describes them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any, Protocol, Self, cast

import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16 and float8)
import numpy as np

from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.mesh import Mesh

Array = Any
"""An array of the communicator's own library: numpy on the host, cupy on a GPU."""

Parcels = Mapping[int, Array]
"""Arrays by position in a group: whom they go to, or whom they came from."""

Axis = str | tuple[str, ...] | tuple[int, ...]
"""A mesh axis, several axes taken together, or the ranks of a group, in the order of their positions."""

_FLOAT = frozenset({"sum", "prod", "min", "max", "avg"})
_INTEGER = _FLOAT - {"avg"}

REDUCTIONS: Mapping[str, frozenset[str]] = {
    "float64": _FLOAT,
    "float32": _FLOAT,
    "float16": _FLOAT,
    "bfloat16": _FLOAT,
    "float8_e4m3fn": _FLOAT,
    "float8_e5m2": _FLOAT,
    "int64": _INTEGER,
    "int32": _INTEGER,
    "int8": _INTEGER,
    "uint8": _INTEGER,
    "bool": frozenset({"min", "max"}),
}
"""The reduce ops defined for each dtype; moving data is defined for every dtype.

Floats narrower than 32 bits are accumulated in float32 and rounded once. Integers wrap around.
For bool, min is `and`, max is `or`. An integer average would have to round, so there is none.
"""

_NARROW_FLOATS = frozenset({"float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})
_UFUNCS = {"sum": np.add, "avg": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}


class ReductionNotDefined(RunError, TypeError):
    """This reduce op has no meaning for this dtype (see `REDUCTIONS`)."""

    code = "OM5104"


class CollectiveMismatch(RunError):
    """Two ranks met with different collectives, shapes or dtypes; the program differs between ranks."""

    code = "OM5103"


class CollectiveTimeout(RunError, TimeoutError):
    """Some ranks of a group did not arrive at a collective in time."""

    code = "OM5102"

    def __init__(self, call: Call, missing: Sequence[int], seconds: float) -> None:
        self.call = call
        self.missing = tuple(missing)
        names = ", ".join(map(str, missing))
        super().__init__(
            f"{call} timed out after {seconds:g} s: no sign of rank {names}",
            hint="a rank hangs or has left the program; if it is only slow, raise the timeout",
        )


class PeerFailed(RunError):
    """Another rank failed, so this collective cannot end; carries that rank and its error's text."""

    code = "OM5101"

    def __init__(self, rank: int, error: str) -> None:
        self.rank = rank
        self.error = error
        super().__init__(f"rank {rank} failed: {error}")


@dataclass(frozen=True)
class Call:
    """One collective as one rank sees it; all ranks of the group must see the same."""

    kind: str
    group: tuple[int, ...]
    sequence: int  # of the collectives of this group, counted from 0
    shape: tuple[int, ...]  # of the local piece
    dtype: str
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options)
        ranks = ", ".join(map(str, self.group))
        return f"{self.kind} #{self.sequence} of ranks ({ranks}) on {self.dtype}{list(self.shape)}{options}"


class Communicator(Protocol):
    """What a rank needs to work with the others.

    Every collective is met by all ranks of a group: the ranks along `axis`. `root` is a position
    in the group. Shapes and dtypes are equal on all ranks; the result is a new array, and `x` may be
    overwritten once the call returns. Reductions run in the order of the group, so they give equal
    bits on every rank and in every run.

    All raise ValueError for a wrong axis, dim or root or a dim that does not divide;
    `CollectiveMismatch`, `CollectiveTimeout` or `PeerFailed` if the ranks do not come together;
    the reducing ones also `ReductionNotDefined`.
    """

    rank: int
    mesh: Mesh

    def all_reduce(self, x: Array, axis: Axis, op: str = "sum") -> Array:
        """The reduction of all ranks' `x`, same shape, on every rank."""
        ...

    def reduce_scatter(self, x: Array, axis: Axis, op: str = "sum", dim: int = 0) -> Array:
        """This rank's 1/n, along `dim`, of the reduction of all ranks' `x`."""
        ...

    def all_gather(self, x: Array, axis: Axis, dim: int = 0) -> Array:
        """All ranks' `x` concatenated along `dim`: n times as long there."""
        ...

    def all_to_all(self, x: Array, axis: Axis, split_dim: int = 0, concat_dim: int = 0) -> Array:
        """Cut `x` along `split_dim` for the n ranks; concatenate what they cut for this one."""
        ...

    def broadcast(self, x: Array, axis: Axis, root: int = 0) -> Array:
        """The root's `x`. Elsewhere only the shape and dtype of `x` count."""
        ...

    def reduce(self, x: Array, axis: Axis, op: str = "sum", root: int = 0) -> Array | None:
        """The reduction of all ranks' `x` on the root, None elsewhere."""
        ...

    def gather(self, x: Array, axis: Axis, root: int = 0, dim: int = 0) -> Array | None:
        """All ranks' `x` concatenated along `dim` on the root, None elsewhere."""
        ...

    def scatter(self, x: Array | None, axis: Axis, root: int = 0, dim: int = 0, like: Array | None = None) -> Array:
        """This rank's 1/n, along `dim`, of the root's `x`.

        Ranks other than the root pass `like`, which has the shape and dtype of their piece.
        """
        ...

    def shift(self, x: Array, axis: Axis, offset: int = 1) -> Array:
        """The `x` of the rank `offset` positions before this one, around the ring."""
        ...

    def barrier(self, axis: Axis | None = None) -> None:
        """Wait for the group, or, without an axis, for the whole mesh."""
        ...

    def close(self) -> None:
        """Give back what the communicator holds; no calls after this."""
        ...

    def abort(self, error: BaseException) -> None:
        """End the other ranks because of this rank's `error`."""
        ...


class Scoped(ABC):
    """A communicator for a `with` block: leaving it closes the communicator, or aborts it if an exception ended it."""

    @abstractmethod
    def close(self) -> None:
        """See Communicator.close."""

    @abstractmethod
    def abort(self, error: BaseException) -> None:
        """See Communicator.abort."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort(error)
        self.close()


def resolve_group(mesh: Mesh, rank: int, axis: Axis) -> tuple[int, ...]:
    """The ranks that meet `rank` over `axis`, by position. Raises ValueError for a wrong axis or group."""
    if not axis or not all(isinstance(member, int) for member in axis):
        return mesh.group(rank, cast(tuple[str, ...], axis))
    group = cast(tuple[int, ...], axis)
    if rank not in group or len(set(group)) != len(group):
        raise ValueError(f"a group must hold rank {rank} and each rank once, got {group}")
    for member in group:
        mesh.coordinate(member)  # raises for a rank outside the mesh
    return group


def check_reduction(op: str, dtype: str) -> None:
    """Raise `ReductionNotDefined` unless `REDUCTIONS` has this op for this dtype."""
    if op not in REDUCTIONS.get(dtype, frozenset()):
        known = ", ".join(sorted(REDUCTIONS.get(dtype, ()))) or "none"
        raise ReductionNotDefined(f"reduce op {op} is not defined for {dtype} (defined: {known})")


def reduce_arrays(op: str, arrays: Sequence[Array]) -> Array:
    """The reduction of equal-shaped NumPy arrays, first to last, as a new array of their dtype."""
    dtype = arrays[0].dtype
    check_reduction(op, dtype.name)
    work = np.dtype(np.float32) if dtype.name in _NARROW_FLOATS else dtype
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.array(arrays[0], dtype=work, order="C")
        for array in arrays[1:]:
            _UFUNCS[op](total, array.astype(work, copy=False), out=total)
        if op == "avg":
            total /= len(arrays)
        return total.astype(dtype, copy=False)


@dataclass(frozen=True)
class CollectiveRecord:
    """One collective that a rank ran: `bytes`, `dtype` and `shape` are those of the array it passed."""

    kind: str
    axis: Axis | None
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    op: str | None = None


class RecordingCommunicator(Communicator):
    """Does what `inner` does and notes each collective in `records`, in order.

    Over a `LoneCommunicator` it shows what one rank's program would send, without the other ranks.
    """

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.mesh = inner.mesh
        self.records: list[CollectiveRecord] = []

    def all_reduce(self, x: Array, axis: Axis, op: str = "sum") -> Array:
        self._note("all_reduce", axis, x, op)
        return self.inner.all_reduce(x, axis, op)

    def reduce_scatter(self, x: Array, axis: Axis, op: str = "sum", dim: int = 0) -> Array:
        self._note("reduce_scatter", axis, x, op)
        return self.inner.reduce_scatter(x, axis, op, dim)

    def all_gather(self, x: Array, axis: Axis, dim: int = 0) -> Array:
        self._note("all_gather", axis, x)
        return self.inner.all_gather(x, axis, dim)

    def all_to_all(self, x: Array, axis: Axis, split_dim: int = 0, concat_dim: int = 0) -> Array:
        self._note("all_to_all", axis, x)
        return self.inner.all_to_all(x, axis, split_dim, concat_dim)

    def broadcast(self, x: Array, axis: Axis, root: int = 0) -> Array:
        self._note("broadcast", axis, x)
        return self.inner.broadcast(x, axis, root)

    def reduce(self, x: Array, axis: Axis, op: str = "sum", root: int = 0) -> Array | None:
        self._note("reduce", axis, x, op)
        return self.inner.reduce(x, axis, op, root)

    def gather(self, x: Array, axis: Axis, root: int = 0, dim: int = 0) -> Array | None:
        self._note("gather", axis, x)
        return self.inner.gather(x, axis, root, dim)

    def scatter(self, x: Array | None, axis: Axis, root: int = 0, dim: int = 0, like: Array | None = None) -> Array:
        self._note("scatter", axis, like if x is None else x)
        return self.inner.scatter(x, axis, root, dim, like)

    def shift(self, x: Array, axis: Axis, offset: int = 1) -> Array:
        self._note("shift", axis, x)
        return self.inner.shift(x, axis, offset)

    def barrier(self, axis: Axis | None = None) -> None:
        self.records.append(CollectiveRecord("barrier", axis, 0, "", ()))
        self.inner.barrier(axis)

    def close(self) -> None:
        self.inner.close()

    def abort(self, error: BaseException) -> None:
        self.inner.abort(error)

    def _note(self, kind: str, axis: Axis, x: Array, op: str | None = None) -> None:
        dtype, shape = np.dtype(x.dtype), tuple(x.shape)
        self.records.append(CollectiveRecord(kind, axis, prod(shape) * dtype.itemsize, dtype.name, shape, op))
