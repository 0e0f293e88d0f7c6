"""Every collective as one rank sees it, with what NumPy says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cupy
import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16 and float8)
import numpy as np
from test_comm import DEFINED, SHAPE, cut, reduction, same, sample

from onnxmesh.runtime.collectives import execute
from onnxmesh.runtime.comm import REDUCTIONS, Communicator
from onnxmesh.runtime.cuda.device import CudaDevice
from onnxmesh.runtime.nccl import NcclCommunicator
from onnxmesh.runtime.plan import Collective

Act = Callable[[Any], Any]


@dataclass(frozen=True)
class Check:
    """A collective on this rank's sample, and the array that it must give."""

    name: str
    dtype: str
    act: Act
    expected: np.ndarray | None


def checks(comm: Communicator, axis: str) -> Iterator[Check]:
    """All that is defined for dtypes that CuPy can hold."""
    group = comm.mesh.group(comm.rank, axis)
    at, size = group.index(comm.rank), len(group)
    root = size - 1
    for dtype, op in DEFINED:
        if not holds(dtype):
            continue
        whole = reduction(op, [sample(rank, dtype) for rank in group])
        yield Check(f"all_reduce {op}", dtype, lambda x, op=op: comm.all_reduce(x, axis, op), whole)
        for dim in (0, 1):
            name, piece = f"reduce_scatter {op} {dim}", cut(whole, dim, size, at)
            yield Check(name, dtype, lambda x, op=op, dim=dim: comm.reduce_scatter(x, axis, op, dim), piece)
        own = whole if at == root else None
        yield Check(f"reduce {op}", dtype, lambda x, op=op: comm.reduce(x, axis, op, root), own)
    for dtype in (*REDUCTIONS, "int16", "uint64", "complex64"):
        if holds(dtype):
            yield from moving(comm, axis, dtype, [sample(rank, dtype) for rank in group], at)


def moving(comm: Communicator, axis: str, dtype: str, pieces: list[np.ndarray], at: int) -> Iterator[Check]:
    """What only moves data."""
    size, root = len(pieces), len(pieces) - 1
    for dim in (0, 1, -1):
        want = np.concatenate(pieces, dim)
        yield Check(f"all_gather {dim}", dtype, lambda x, dim=dim: comm.all_gather(x, axis, dim), want)
        yield Check(
            f"gather {dim}", dtype, lambda x, dim=dim: comm.gather(x, axis, root, dim), want if at == root else None
        )
    for split, concat in ((0, 1), (1, 0), (0, 0), (-1, -2)):
        want = np.concatenate([cut(piece, split, size, at) for piece in pieces], concat)
        yield Check(
            f"all_to_all {split} {concat}", dtype, lambda x, s=split, c=concat: comm.all_to_all(x, axis, s, c), want
        )
    yield Check("broadcast", dtype, lambda x: comm.broadcast(x, axis, root), pieces[root])
    like = np.empty((SHAPE[0], SHAPE[1] // size), dtype)
    scatter: Act = lambda x: comm.scatter(x if at == root else None, axis, root, 1, like)  # noqa: E731
    yield Check("scatter", dtype, scatter, cut(pieces[root], 1, size, at))
    yield from rooted(comm, axis, dtype, pieces, at)
    for offset in (1, -1, 3, 0):
        want = pieces[(at - offset) % size]
        yield Check(f"shift {offset}", dtype, lambda x, offset=offset: comm.shift(x, axis, offset), want)


def rooted(comm: Communicator, axis: str, dtype: str, pieces: list[np.ndarray], at: int) -> Iterator[Check]:
    """The instructions of a plan that have a root: every rank has a result, zeros where nothing comes."""
    size, root = len(pieces), len(pieces) - 1
    gathered = np.concatenate(pieces, 1)
    for kind, attrs, want in (
        ("Broadcast", {}, pieces[root]),
        ("GatherTo", {"dim": 1}, gathered if at == root else np.zeros_like(gathered)),
        ("ScatterFrom", {"dim": 1}, cut(pieces[root], 1, size, at)),
    ):
        item = Collective(kind, axis, (0,), (1,), {**attrs, "root": root})
        yield Check(f"{kind} of a plan", dtype, lambda x, item=item: execute(item, x, comm, cupy), want)


def holds(dtype: str) -> bool:
    """Whether CuPy has arrays of this dtype."""
    try:
        cupy.asarray(np.zeros(2, dtype)).copy()
    except Exception:
        return False
    return True


def check_all(comm: NcclCommunicator, axis: str) -> tuple[list[str], int]:
    """What went wrong, and how many checks there were."""
    device, wrong, count = CudaDevice(comm.groups.world.local_rank, comm.groups), [], 0
    with device.scope():
        for check in checks(comm, axis):
            x = cupy.asarray(sample(comm.rank, check.dtype))
            for how, result in (("", check.act(x)), (" in a graph", captured(device, check.act, x))):
                got = None if result is None else device.get(result)
                count += 1
                if not same(got, check.expected):
                    wrong.append(f"{check.name} {check.dtype}{how} on rank {comm.rank}: {got!r}"[:400])
    return wrong, count


def captured(device: CudaDevice, act: Act, x: Any) -> Any:
    """The result of `act` from the second replay of a graph."""
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        result = act(x)
        device.synchronize()
        device.stream.begin_capture()
        try:
            result = act(x)
        finally:
            graph = device.stream.end_capture()
    if result is not None:
        result.fill(0)
    for _ in range(2):
        graph.launch(device.stream)
    device.synchronize()
    return result
