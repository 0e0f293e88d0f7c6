"""Collectives between buffers of a program: prepared once, launched through NCCL without allocating.

All messages of an instruction are one group, which NCCL runs as one kernel. What must be packed or unpacked is one
more kernel each (see runtime/exchange.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from onnxmesh.runtime.cuda.device import import_cupy, import_nccl
from onnxmesh.runtime.cuda.launchers import Launch
from onnxmesh.runtime.exchange import Moves, moves, staged
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.memory import aligned
from onnxmesh.runtime.nccl import NcclCommunicator, is_native
from onnxmesh.runtime.plan import Collective


class Staging:
    """Memory in which the collectives of one stream pack and unpack, one after another.

    Args:
        size: bytes; see onnxmesh.runtime.exchange.staging_sizes.
    """

    def __init__(self, size: int) -> None:
        self._memory = import_cupy().empty(size, "u1")
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(self._memory.size)

    def restart(self) -> None:
        """Give the same memory again, to the next collective."""
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of the memory, aligned."""
        nbytes = prod(shape) * dtype.itemsize
        part = self._memory[self._used : self._used + nbytes]
        self._used += aligned(nbytes)
        return part.view(dtype).reshape(shape)


def prepare(
    item: Collective, ins: Sequence[Array], outs: Sequence[Array], rank: NcclCommunicator, staging: Staging
) -> Launch | None:
    """What runs a collective; None where only the generic way does it.

    All ranks of the group prepare it together: the first of a group connects them.
    """
    group = rank.mesh.group(rank.rank, item.axis)
    for number, (x, out) in enumerate(zip(ins, outs)):
        packs, unpacks = staged(item.kind, item.attrs_of(number), x.shape, out.shape)
        if not ((packs or x.flags.c_contiguous) and (unpacks or out.flags.c_contiguous)):
            return None
    staging.restart()
    todo = moves(item, ins, outs, len(group), group.index(rank.rank), staging.take)
    if todo is None or not all(
        kind == "all_gather" or is_native(reduction, x) for kind, x, _, reduction in todo.native
    ):
        return None
    return _launch(todo, rank, group)


def _launch(todo: Moves, rank: NcclCommunicator, group: tuple[int, ...]) -> Launch:
    from onnxmesh.runtime.cuda.codegen.copy import strided_copy

    nccl = import_nccl()
    communicator: Any = rank.groups.of(group) if len(group) > 1 else None
    pack = strided_copy(todo.pack) if todo.pack else None
    unpack = strided_copy(todo.unpack) if todo.unpack else None
    calls = [call for entry in todo.native if entry[1].size for call in [_native(rank, communicator, *entry)]]
    calls += [_message(nccl, communicator.send, x, to) for x, to in todo.sends if x.size]
    calls += [_message(nccl, communicator.recv, x, source) for x, source in todo.receives if x.size]

    def launch(stream: int) -> None:
        if pack is not None:
            pack(stream)
        if len(calls) == 1:
            calls[0](stream)
        elif calls:
            nccl.groupStart()
            for call in calls:
                call(stream)
            nccl.groupEnd()
        if unpack is not None:
            unpack(stream)

    return launch


def _native(rank: NcclCommunicator, communicator: Any, kind: str, x: Array, out: Array, reduction: str) -> Launch:
    source, target = int(x.data.ptr), int(out.data.ptr)
    if kind == "all_gather":
        uint8 = import_nccl().NCCL_UINT8
        return lambda stream: communicator.allGather(source, target, x.nbytes, uint8, stream)
    dtype, operation = rank.kinds(reduction, x)
    if kind == "all_reduce":
        return lambda stream: communicator.allReduce(source, target, x.size, dtype, operation, stream)
    return lambda stream: communicator.reduceScatter(source, target, out.size, dtype, operation, stream)


def _message(nccl: Any, send: Any, x: Array, peer: int) -> Launch:
    pointer, nbytes, uint8 = int(x.data.ptr), int(x.nbytes), nccl.NCCL_UINT8
    return lambda stream: send(pointer, nbytes, uint8, peer, stream)
