"""Measures a host's GPUs and their links: the ranks of `onnxmesh doctor`, `measure WHAT OUTPUT`.

What is `check` (the collectives at a few sizes, and whether they are right) or `profile` (all that a device profile
is made of). Every rank measures by running synthetic programs (measure_programs.py) in its engine; rank 0 writes the
rows as JSON. Times are those of the slowest rank, in microseconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.cuda import measure_programs as programs
from onnxmesh.runtime.cuda.measure_programs import Chain
from onnxmesh.runtime.device import Device
from onnxmesh.runtime.mesh import Mesh

Row = dict[str, Any]
Join = Callable[[float], float]
"""The largest of all ranks' numbers."""
Comm = Callable[[Mesh], Communicator]

CHECKED = (64 << 10, 1 << 20, 16 << 20, 256 << 20)
"""Bytes of the larger side of a collective."""
PROFILED = (8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)

GEMMS = {
    "bfloat16": (
        *((8192, 8192, 8192), (4608, 12288, 3072), (4608, 3072, 12288), (4608, 9216, 3072), (4608, 3072, 3072)),
        *((2304, 9216, 3072), (1152, 12288, 3072), (1152, 3072, 12288), (576, 12288, 3072), (576, 3072, 12288)),
        *((576, 9216, 3072), (576, 3072, 3072), (4096, 1280, 8192), (4096, 8192, 1024), (4096, 3584, 8192)),
        *((128, 8192, 8192), (32, 8192, 8192), (8, 8192, 8192), (1, 8192, 8192), (1, 8192, 3584), (1, 1280, 8192)),
        *((1, 8192, 1024), (256, 256, 256)),
    ),
    "float16": ((8192, 8192, 8192), (4608, 12288, 3072), (576, 3072, 12288), (1, 8192, 8192), (256, 256, 256)),
    "float32": ((4096, 4096, 4096), (1024, 3072, 3072), (256, 3072, 3072), (1, 8192, 8192), (256, 256, 256)),
}
"""(m, n, k) by dtype."""
ATTENTIONS = {
    "bfloat16": (
        *((24, 24, 4608, 4608, 128, False), (24, 24, 2304, 4608, 128, False), (24, 24, 576, 4608, 128, False)),
        *((6, 6, 4608, 4608, 128, False), (3, 3, 4608, 4608, 128, False), (24, 24, 576, 576, 128, False)),
        *((24, 24, 16384, 16384, 128, False), (24, 24, 2048, 16384, 128, False), (24, 24, 256, 256, 64, False)),
        *((64, 8, 4096, 4096, 128, True), (8, 1, 4096, 4096, 128, True), (32, 8, 1024, 1024, 128, True)),
        (64, 8, 1, 4096, 128, False),
    ),
    "float16": ((24, 24, 4608, 4608, 128, False), (24, 24, 576, 576, 128, False), (64, 8, 4096, 4096, 128, True)),
    "float32": ((8, 8, 1024, 1024, 64, False), (8, 8, 256, 256, 64, False), (8, 8, 1024, 1024, 64, True)),
}
"""(heads, heads of keys, queries, keys, width, causal) by dtype."""
SUMS = tuple(1 << power for power in (12, 16, 18, 20, 21, 22, 23, 24, 25, 26, 27))
"""Elements of bfloat16."""

ENOUGH = 3000.0
"""Microseconds that a program should take, so that starting it counts for nothing."""
_MOST = 200
_REPEATS = 4


class Bench:
    """Runs chains on this rank.

    Args:
        join: makes one number of all ranks'.
    """

    def __init__(self, device: Device, rank: Communicator, join: Join) -> None:
        self.device, self.rank, self.join = device, rank, join

    def time(self, chain: Chain, rank: Communicator | None = None) -> float:
        """Microseconds of one instruction of a chain; of the slowest rank."""
        return self.run(chain, rank)[0] / chain.count

    def run(self, chain: Chain, rank: Communicator | None = None) -> tuple[float, Any]:
        """Microseconds of a whole chain on the slowest rank, and this rank's first output, on the host."""
        device = self.device
        weights = [device.put(x) for x in chain.weights]
        inputs = [device.put(x) for x in chain.inputs]
        engine = device.engine(chain.program, weights, rank or self.rank, None)
        try:
            with device.scope():
                engine.run(inputs)
                for _ in range(3):
                    engine.run_bound()
                took = min(self._once(engine) for _ in range(_REPEATS))
                result = device.get(engine.array(chain.program.outputs[0].buffer))
        finally:
            engine.close()
            del engine, weights, inputs
            self._tidy()
        return self.join(took), result

    def _once(self, engine: Any, runs: int = 3) -> float:
        self.rank.barrier()
        start = time.perf_counter()
        for _ in range(runs):
            engine.run_bound()
        self._wait()
        return 1e6 * (time.perf_counter() - start) / runs

    def _wait(self) -> None:
        synchronize = getattr(self.device, "synchronize", None)
        if synchronize is not None:
            synchronize()

    def _tidy(self) -> None:
        pool = getattr(self.device, "pool", None)
        if pool is not None:
            pool.free_all_blocks()


def count_of(guess: float) -> int:
    """How often to repeat an instruction that takes about so many microseconds."""
    return int(min(_MOST, max(4, ENOUGH // max(guess, 1.0))))


def gemms(bench: Bench, shapes: Any = None) -> Iterator[Row]:
    """Products of all dtypes and shapes."""
    for kind, sizes in (shapes or GEMMS).items():
        rate = 50e6 if kind == "float32" else 500e6
        for m, n, k in sizes:
            guess = max(2.0 * m * n * k / rate, n * k / 1e6, 4.0)
            microseconds = bench.time(programs.gemm(kind, m, n, k, count_of(guess)))
            yield {"dtype": kind, "m": m, "n": n, "k": k, "us": microseconds}


def attentions(bench: Bench, shapes: Any = None) -> Iterator[Row]:
    """Attention of all dtypes and shapes."""
    for kind, sizes in (shapes or ATTENTIONS).items():
        rate = 5e6 if kind == "float32" else 500e6
        for heads, groups, s, t, d, causal in sizes:
            guess = max(4.0 * heads * s * t * d / rate, 8.0)
            chain = programs.attention(kind, heads, groups, s, t, d, causal, count_of(guess))
            sizes_ = {"heads": heads, "kv_heads": groups, "s": s, "t": t, "d": d, "causal": causal}
            yield {"dtype": kind, **sizes_, "us": bench.time(chain)}


def sums(bench: Bench, sizes: Sequence[int] = SUMS) -> Iterator[Row]:
    """An elementwise kernel that reads two arrays and writes one."""
    for size in sizes:
        chain = programs.elementwise("bfloat16", size, count_of(max(6.0 * size / 3e6, 2.0)))
        yield {"bytes": 6 * size, "us": bench.time(chain)}


def collectives(bench: Bench, on: Comm, sizes: Sequence[int], counts: Sequence[int]) -> Iterator[Row]:
    """Every collective at every size, on groups of so many neighbouring ranks, all groups at once."""
    world = bench.rank.mesh.size
    for ranks in counts:
        rank = on(Mesh.of(tp=ranks, cp=world // ranks))
        place = rank.mesh.coordinate(rank.rank)["tp"]
        for kind, how in programs.KINDS.items():
            for nbytes in sizes:
                size = programs.elements(nbytes, ranks)
                sent = how.sent(2 * size, ranks)
                chain = programs.collective(kind, "tp", place, ranks, size, count_of(8.0 + sent / 0.2e6))
                took, result = bench.run(chain, rank)
                wrong = bench.join(float(not programs.correct(kind, place, ranks, result)))
                microseconds = took / chain.count
                yield {
                    "kind": kind,
                    "ranks": ranks,
                    "bytes": 2 * size,
                    "sent": sent,
                    "us": microseconds,
                    "bus_GB_s": sent / microseconds / 1e3,
                    "correct": not wrong,
                }


def contention(bench: Bench, on: Comm, side: int = 4096, size: int = 32 << 20) -> float:
    """How much longer products take while an all-gather runs beside them."""
    ranks = bench.rank.mesh.size
    rank = on(Mesh.of(tp=ranks))
    size = programs.elements(2 * size, ranks)
    sends, products = 8, 12
    alone = bench.run(programs.beside("tp", ranks, side, products, size, 0), rank)[0]
    sent = bench.run(programs.beside("tp", ranks, side, 0, size, sends), rank)[0]
    products = max(products, int(2 * sent / alone * products))
    alone = bench.run(programs.beside("tp", ranks, side, products, size, 0), rank)[0]
    both = bench.run(programs.beside("tp", ranks, side, products, size, sends), rank)[0]
    return max(1.0, 1.0 + (both - alone) / sent)


def group_sizes(world: int) -> list[int]:
    """The numbers of ranks to measure: the powers of two that divide the world, and itself."""
    return sorted({count for count in (2, 4, 8, world) if 1 < count <= world and world % count == 0})


def check(bench: Bench, on: Comm) -> Row:
    """The self-test."""
    world = bench.rank.mesh.size
    return {"collectives": list(collectives(bench, on, CHECKED, [world])) if world > 1 else []}


def profile(bench: Bench, on: Comm) -> Row:
    """All that a device profile is made of."""
    world = bench.rank.mesh.size
    return {
        "gemm": list(gemms(bench)),
        "attention": list(attentions(bench)),
        "memory": list(sums(bench)),
        "collectives": list(collectives(bench, on, PROFILED, group_sizes(world))),
        "contention": contention(bench, on) if world > 1 else 1.0,
    }


def main(what: str, output: str) -> int:
    """One rank of the measurement; the environment says which."""
    from onnxmesh.runtime.cuda.device import CudaDevice
    from onnxmesh.runtime.nccl import NcclCommunicator
    from onnxmesh.runtime.rendezvous import World, find_place

    with World(find_place(), timeout=300.0, serve=False) as world:
        with NcclCommunicator(Mesh.of(tp=world.size), world) as rank:
            device = CudaDevice(world.local_rank, rank.groups)
            bench = Bench(device, rank, lambda number: max(world.allgather(number)))
            found = {"check": check, "profile": profile}[what](bench, rank.on)
        if world.rank == 0:
            Path(output).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
