"""Collectives as one kernel each, which writes into the other ranks' buffers, or reads them, over NVLink.

AllToAll, AllGather and Shift push: every element goes straight to its place in the result, and nothing is packed.
ReduceScatter and AllReduce pull: they read all ranks' inputs and sum from position 0 upwards in float32, so all ranks
get equal bits; an AllReduce of more than `ONE_SHOT` bytes sums 1/n on every rank and pushes it to the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.launchers import Launch, chain
from onnxmesh.runtime.cuda.peer_memory import PeerMemory
from onnxmesh.runtime.cuda.peer_source import LINE, MOST_RANKS, SOURCE, THREADS
from onnxmesh.runtime.exchange import pulls, pushes
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.nccl import NcclCommunicator
from onnxmesh.runtime.plan import Collective

MOST_BLOCKS = 24
"""Blocks of a kernel: so many multiprocessors fill NVLink."""
LINES = 64
"""Flags of a channel: no kernel has more blocks."""
BYTES_A_BLOCK = 16 << 10
ONE_SHOT = 256 << 10
"""Bytes up to which every rank of an AllReduce reads all of the others' inputs."""
_SUMMED = {"float32": ("4", "0"), "float16": ("2", "0"), "bfloat16": ("2", "1")}

_LOOPS = np.dtype(
    [
        *(("sizes", np.uint32, 4), ("reads", np.uint32, 3), ("writes", np.uint32, 3)),
        *(("width", np.int32), ("pad", np.int32)),
    ]
)
_COPY = np.dtype([("from", np.uint64), ("to", np.uint64), ("loops", _LOOPS)])
_SUM = np.dtype(
    [
        *(("from", np.uint64, MOST_RANKS), ("to", np.uint64, MOST_RANKS)),
        *(("targets", np.int32), ("average", np.int32), ("loops", _LOOPS)),
    ]
)
"""The structs of runtime/cuda/peer_source.py."""


class _TooManyLoops(Exception):
    """A copy with more loops than the kernels have."""


class _Group(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_void_p * MOST_RANKS),
        ("epochs", ctypes.c_void_p),
        ("abort", ctypes.c_void_p),
        ("ranks", ctypes.c_int),
        ("here", ctypes.c_int),
        ("first_block", ctypes.c_int),
    )


def prepare(
    item: Collective, ins: Sequence[Array], outs: Sequence[Array], rank: NcclCommunicator, memory: PeerMemory
) -> Launch | None:
    """What runs a collective; None where it is not of these kinds, or its buffers are not in the arena.

    All ranks decide alike: they have one program.
    """
    group = rank.mesh.group(rank.rank, item.axis)
    here = group.index(rank.rank)
    sums = item.kind in ("AllReduce", "ReduceScatter")
    numbered = list(zip(range(len(ins)), ins, outs))
    # A kernel sums up one dtype; copies are of bytes.
    parts = [[e for e in numbered if e[1].dtype == kind] for kind in dict.fromkeys(x.dtype for x in ins)]
    launches = []
    for part in parts if sums else [numbered]:
        try:
            items = (_sums if sums else _copies)(item, part, group, here, memory)
        except _TooManyLoops:
            return None
        if items is None:
            return None
        nbytes = sum(prod(x.shape) * x.itemsize for _, *pair in part for x in pair)
        blocks = max(1, min(MOST_BLOCKS, nbytes // BYTES_A_BLOCK))
        meeting = _meeting(memory, group, here, memory.lines((item.stream, item.axis), LINES))
        name = "onnxmesh_sum" if sums else "onnxmesh_push"
        launches.append(_launch(name, part[0][1].dtype.name, items, blocks, meeting, memory))
    return chain(launches)


_Numbered = tuple[int, Array, Array]
"""Which of a collective's inputs, that input, and its result."""


def _copies(
    item: Collective, part: Sequence[_Numbered], group: Sequence[int], here: int, memory: PeerMemory
) -> np.ndarray | None:
    found: list[tuple[int, Array, Array]] = []
    for number, x, out in part:
        pushed = pushes(item, number, x, [out] * len(group), len(group), here)
        if pushed is None or memory.offset(out) is None:
            return None
        found += pushed
    # Each rank begins with its neighbour, so that they do not all write to one.
    found.sort(key=lambda entry: (entry[0] - here) % len(group) or len(group))
    rows = [_copy(x, out, _there(out, group[to], memory)) for to, x, out in found if x.size]
    return np.array(rows, _COPY)


def _copy(x: Array, out: Array, to: int) -> tuple[Any, ...]:
    places = int(x.data.ptr), int(out.data.ptr)
    return places[0], to, (*collapsed(x.shape, x.strides, out.strides, x.itemsize, places), 0)


def _sums(
    item: Collective, part: Sequence[_Numbered], group: Sequence[int], here: int, memory: PeerMemory
) -> np.ndarray | None:
    rows = []
    for number, x, out in part:
        reduction = item.attrs_of(number).get("reduce", "sum")
        if x.dtype.name not in _SUMMED or reduction not in ("sum", "avg") or memory.offset(x) is None:
            return None
        for source, target, everywhere in _summed(item, number, x, out, group, here):
            if everywhere and memory.offset(out) is None:
                return None
            targets = [_there(target, r, memory) for r in group] if everywhere else [int(target.data.ptr)]
            rows.append(_sum(source, target, [_there(source, r, memory) for r in group], targets, reduction))
    return np.array([row for row in rows if row is not None], _SUM)


def _summed(
    item: Collective, number: int, x: Array, out: Array, group: Sequence[int], here: int
) -> Iterator[tuple[Array, Array, bool]]:
    """(what is read on every rank, where the sum goes, whether it goes there on every rank)."""
    ranks = len(group)
    if item.kind == "ReduceScatter":
        for source, target in pulls(item, number, x, out, ranks, here):
            yield source, target, False
        return
    x, out = x.reshape(-1), out.reshape(-1)
    if x.nbytes <= ONE_SHOT:
        yield x, out, False
        return
    step = -(-x.size // (8 * ranks)) * 8  # whole vectors
    part = slice(min(here * step, x.size), min((here + 1) * step, x.size))
    yield x[part], out[part], True


def _sum(x: Array, out: Array, sources: Sequence[int], targets: Sequence[int], reduction: str) -> Any:
    if not x.size:
        return None
    loops = (*collapsed(x.shape, x.strides, out.strides, x.itemsize, (*sources, *targets)), 0)

    def padded(addresses: Sequence[int]) -> list[int]:
        return [*addresses, *[0] * (MOST_RANKS - len(addresses))]

    return padded(sources), padded(targets), len(targets), int(reduction == "avg"), loops


def _there(x: Array, rank: int, memory: PeerMemory) -> int:
    """Where another rank has the same buffer."""
    offset = memory.offset(x)
    assert offset is not None
    return memory.arenas[rank] + offset


def collapsed(
    shape: Sequence[int], reads: Sequence[int], writes: Sequence[int], itemsize: int, addresses: Sequence[int]
) -> tuple[list[int], list[int], list[int], int]:
    """A strided copy as three outer loops and one over vectors: sizes, strides in bytes, and bytes of a vector.

    Args:
        reads, writes: strides in bytes.
        addresses: all places that it starts from; they limit the vectors.

    Raises _TooManyLoops where it needs more, or longer strides than 32 bits hold.
    """
    loops: list[tuple[int, int, int]] = []
    for size, read, write in zip(shape, reads, writes):
        if size == 1:
            continue
        if loops and loops[-1][1] == size * read and loops[-1][2] == size * write:
            loops[-1] = (loops[-1][0] * size, read, write)
        else:
            loops.append((size, read, write))
    inner = 1
    if loops and loops[-1][1:] == (itemsize, itemsize):
        inner = loops.pop()[0]
    if len(loops) > 3 or any(size * stride >> 32 for size, *strides in loops for stride in strides):
        raise _TooManyLoops
    limits = (inner * itemsize, *addresses, *(stride for loop in loops for stride in loop[1:]))
    width = next(w for w in (16, 8, 4, 2, 1) if all(limit % w == 0 for limit in limits))
    loops = [(1, 0, 0)] * (3 - len(loops)) + loops
    sizes = [*(size for size, _, _ in loops), inner * itemsize // width]
    return sizes, [read for _, read, _ in loops], [write for _, _, write in loops], width


def _meeting(memory: PeerMemory, group: Sequence[int], here: int, line: int) -> _Group:
    flags = [memory.flags[r] for r in group] + [0] * (MOST_RANKS - len(group))
    return _Group((ctypes.c_void_p * MOST_RANKS)(*flags), memory.epochs, memory.abort, len(group), here, line)


def _launch(name: str, dtype: str, items: np.ndarray, blocks: int, group: _Group, memory: PeerMemory) -> Launch:
    cupy = import_cupy()
    function = _function(name, *_SUMMED.get(dtype, ("4", "0")), group.ranks, cupy.cuda.runtime.getDevice())
    table = cupy.asarray(np.frombuffer(items.tobytes() or bytes(8), np.uint8))
    pointer, count = ctypes.c_void_p(int(table.data.ptr)), ctypes.c_int(len(items))
    parameters = (ctypes.c_void_p * 3)(*(ctypes.addressof(x) for x in (group, pointer, count)))
    launch_kernel, handle, address = cupy.cuda.driver.launchKernel, function.kernel.ptr, ctypes.addressof(parameters)

    def launch(stream: int, _keep: Any = (function, table, group, pointer, count, parameters, memory)) -> None:
        launch_kernel(handle, blocks, 1, 1, THREADS, 1, 1, 0, stream, address, 0)

    return launch


@cache
def _function(name: str, element: str, brain: str, ranks: int, device: int) -> Any:
    defined = {"ELEMENT": element, "BRAIN": brain, "RANKS": ranks}
    defined |= {"THREADS": THREADS, "MOST_RANKS": MOST_RANKS, "LINE": LINE}
    options = ("-std=c++17", *(f"-D{key}={value}" for key, value in defined.items()))
    return import_cupy().RawModule(code=SOURCE, options=options, backend="nvrtc").get_function(name)
