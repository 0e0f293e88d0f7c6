"""How long collectives take in a CUDA graph: through peer memory, with some numbers of blocks, and through NCCL.

python tests/gpu/time_collectives.py [RANKS]
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from typing import Any

BLOCKS = (16, 24, 32, 48)
WIDTH = 3072
REPEAT = 20


def main() -> int:
    """Start the ranks; rank 0 prints the table."""
    if "RANK" in os.environ:
        return _rank()
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        processes.append(subprocess.Popen([sys.executable, __file__], env=environment))
    return max(process.wait() for process in processes)


def _cases(ranks: int) -> Iterator[tuple[str, Any, list[tuple[int, ...]], list[tuple[int, ...]]]]:
    """(name, collective, shapes of inputs, shapes of results), bfloat16."""
    from onnxmesh.runtime.plan import Collective

    def item(kind: str, **attrs: Any) -> Collective:
        return Collective(kind, "tp", (0,), (1,), attrs)

    for rows in (4, 64, 256, 1024, 4096, 16384):
        whole, part = (1, rows * ranks // 2, WIDTH), (1, rows // 2, WIDTH)
        cut = [[whole[1], 1]]
        yield f"AllReduce {rows}", item("AllReduce"), [(1, rows, WIDTH)], [(1, rows, WIDTH)]
        yield f"ReduceScatter {rows}", item("ReduceScatter", dim=1, segments=cut), [whole], [part]
        yield f"AllGather {rows}", item("AllGather", dim=1, segments=cut), [part], [whole]
        yield f"Shift {rows}", item("Shift", offset=1), [(1, rows, WIDTH)], [(1, rows, WIDTH)]
        heads = {"split_dim": 2, "split_segments": [[24, 1]], "concat_dim": 1, "concat_segments": [[rows * ranks, 1]]}
        shapes = [(1, rows, 24, 128)], [(1, rows * ranks, 24 // ranks, 128)]
        yield f"AllToAll {rows}", item("AllToAll", **heads), *shapes
        if rows >= 1024:
            yield f"AllToAll {rows} x 3", item("AllToAll", **heads), shapes[0] * 3, shapes[1] * 3
            back = {
                **{"split_dim": 1, "split_segments": [[rows * ranks, 1]]},
                **{"concat_dim": 2, "concat_segments": [[WIDTH, 1]]},
            }
            given = [(1, rows * ranks, WIDTH // ranks)]
            yield f"AllToAll {rows} back", item("AllToAll", **back), given, [(1, rows, WIDTH)]


def _rank() -> int:
    import cupy
    import ml_dtypes
    import numpy as np

    from onnxmesh.runtime.cuda import collectives, peer_collectives, peer_memory
    from onnxmesh.runtime.cuda.device import CudaDevice
    from onnxmesh.runtime.cuda.peer_memory import PeerMemory
    from onnxmesh.runtime.mesh import Mesh
    from onnxmesh.runtime.nccl import NcclCommunicator
    from onnxmesh.runtime.rendezvous import World, find_place

    kind = np.dtype(ml_dtypes.bfloat16)
    with World(find_place(), timeout=60) as world:
        comm = NcclCommunicator(Mesh.of(tp=world.size), world)
        device = CudaDevice(world.local_rank, comm.groups)
        with device.scope():
            arena = peer_memory.allocate(2 << 30)
            arena.fill(0)
            memory = PeerMemory.share(arena, comm.groups)
            staging = collectives.Staging(1 << 30)
            if world.rank == 0:
                print(
                    f"{world.size} ranks, us" + "".join(f"{f'{n} blocks':>11}" for n in BLOCKS) + "       NCCL  MB in"
                )
            for name, item, ins, outs in _cases(world.size):
                offset, arrays = 0, []
                for shape in (*ins, *outs):
                    size = prod(shape) * 2
                    arrays.append(arena[offset : offset + size].view(kind).reshape(shape))
                    offset += -(-size // 256) * 256
                x, out = arrays[: len(ins)], arrays[len(ins) :]
                times = []
                for blocks in BLOCKS:
                    peer_collectives.MOST_BLOCKS = blocks
                    assert memory is not None
                    times.append(_time(cupy, device, peer_collectives.prepare(item, x, out, comm, memory)))
                times.append(_time(cupy, device, collectives.prepare(item, x, out, comm, staging)))
                slowest = np.max(world.allgather(times), axis=0)
                if world.rank == 0:
                    size = sum(prod(shape) * 2 for shape in ins) / 1e6
                    print(f"{name:20}" + "".join(f"{t:11.1f}" for t in slowest) + f"{size:9.2f}", flush=True)
            if memory is not None:
                memory.close()
        comm.close()
    return 0


def _time(cupy: Any, device: Any, launch: Any) -> float:
    """Microseconds of one of `REPEAT` launches in a graph; the median of some replays."""
    if launch is None:
        return float("nan")
    stream = device.stream
    launch(int(stream.ptr))
    device.synchronize()
    stream.begin_capture()
    for _ in range(REPEAT):
        launch(int(stream.ptr))
    graph = stream.end_capture()
    found = []
    for _ in range(7):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        stop.record(stream)
        device.synchronize()
        found.append(cupy.cuda.get_elapsed_time(start, stop) * 1000 / REPEAT)
    return sorted(found)[len(found) // 2]


if __name__ == "__main__":
    sys.exit(main())
