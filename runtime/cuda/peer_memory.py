"""The arenas of all ranks of a host, mapped into each other (CUDA IPC).

All ranks run one program, so a buffer lies at the same offset of every rank's arena. Beside the arena each rank has a
block of flags, by which the kernels of runtime/cuda/peer_source.py meet.
"""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.peer_source import LINE, MOST_RANKS
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.nccl import NcclGroups

BLOCKS = 4096
"""Lines of flags: each channel takes as many as the largest of its grids."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def wanted() -> bool:
    """Whether collectives may go through peer memory at all. ONNXMESH_PEER=0 says no."""
    return os.environ.get("ONNXMESH_PEER", "1") not in ("", "0")


def allocate(nbytes: int) -> Array:
    """Bytes in an allocation of their own, which is what can be shared."""
    cupy = import_cupy()
    memory = cupy.cuda.Memory(max(nbytes, 256))
    return cupy.ndarray((nbytes,), "u1", cupy.cuda.MemoryPointer(memory, 0))


class PeerMemory:
    """This rank's arena and flags, and where those of the other ranks are mapped. Close it after the last launch.

    Use `share`, which all ranks call together.

    Attributes:
        arenas: the address of every rank's arena in this process.
        flags: likewise of its flags: uint32, `LINE` for each block.
        epochs: the address of this rank's own counts of meetings, one for each block.
        abort: the address of a word of the host; not 0: stop waiting.
    """

    def __init__(self, arena: Array, groups: NcclGroups) -> None:
        cupy = import_cupy()
        self._groups = groups
        self._arena, self._lines = arena, allocate(4 * LINE * BLOCKS)
        self._epochs = cupy.zeros(BLOCKS, "u4")
        self._lines.fill(0)
        self._word = cupy.cuda.alloc_pinned_memory(64)
        self._opened: list[int] = []
        self._taken: dict[Any, int] = {}
        self._free = 0
        self.arenas: dict[int, int] = {groups.world.rank: int(arena.data.ptr)}
        self.flags: dict[int, int] = {groups.world.rank: int(self._lines.data.ptr)}
        self.epochs = int(self._epochs.data.ptr)
        self.abort = int(self._word.ptr)
        self._set_abort(0)
        cupy.cuda.get_current_stream().synchronize()

    @classmethod
    def share(cls, arena: Array, groups: NcclGroups) -> PeerMemory | None:
        """The memory of all ranks, for `arena` from `allocate`; None on every rank if one cannot reach the others."""
        world = groups.world
        if world.store is None or world.size > MOST_RANKS:
            return None
        memory = cls(arena, groups)
        offer = memory._offer() if wanted() and arena.size else None
        offers = world.allgather(offer)
        hosts = {offer and offer["host"] for offer in offers}
        opened = None not in hosts and len(hosts) == 1 and memory._open(offers)
        if all(world.allgather(opened)):
            groups.on_abort.append(memory._stop)
            return memory
        memory._unmap()
        return None

    def lines(self, channel: Any, count: int) -> int:
        """The first line of flags of a channel that needs so many; all ranks ask in one order."""
        if channel not in self._taken:
            self._taken[channel] = self._free
            self._free += count
            if self._free > BLOCKS:
                raise ValueError(f"more than {BLOCKS} blocks of channels")
        return self._taken[channel]

    def offset(self, x: Array) -> int | None:
        """Where an array starts in the arena, in bytes; None where it lies elsewhere."""
        start = int(x.data.ptr) - int(self._arena.data.ptr)
        return start if 0 <= start < self._arena.size else None

    def close(self) -> None:
        """Unmap the others' memory. This rank's goes when nobody maps it any more: all ranks close together."""
        with suppress(Exception):
            self._groups.on_abort.remove(self._stop)
        self._unmap()
        with suppress(Exception):  # after a failure nobody is there to wait for
            if self._groups.failure is None:
                self._groups.world.allgather("unmapped")

    def _offer(self) -> dict[str, str] | None:
        runtime = import_cupy().cuda.runtime
        try:
            handles = [runtime.ipcGetMemHandle(int(x.data.ptr)) for x in (self._arena, self._lines)]
        except runtime.CUDARuntimeError:
            return None
        boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        arena, flags = (bytes(handle).hex() for handle in handles)
        return {"host": f"{socket.gethostname()} {boot}", "arena": arena, "flags": flags}

    def _open(self, offers: list[Any]) -> bool:
        runtime = import_cupy().cuda.runtime
        try:
            for rank, offer in enumerate(offers):
                if rank == self._groups.world.rank:
                    continue
                for name, found in (("arena", self.arenas), ("flags", self.flags)):
                    found[rank] = int(runtime.ipcOpenMemHandle(bytes.fromhex(offer[name])))
                    self._opened.append(found[rank])
        except (runtime.CUDARuntimeError, ValueError):
            return False
        return True

    def _unmap(self) -> None:
        runtime = import_cupy().cuda.runtime
        while self._opened:
            with suppress(runtime.CUDARuntimeError):
                runtime.ipcCloseMemHandle(self._opened.pop())

    def _stop(self) -> None:
        self._set_abort(1)

    def _set_abort(self, value: int) -> None:
        ctypes.c_int.from_address(self.abort).value = value
