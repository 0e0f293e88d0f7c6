"""Collectives from buffer to buffer, as the GPU engine prepares them, against the same on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import cupy
import numpy as np
from test_exchange import cases, samples

from onnxmesh.runtime.collectives import execute
from onnxmesh.runtime.cuda import collectives, peer_collectives, peer_memory
from onnxmesh.runtime.cuda.collectives import Staging
from onnxmesh.runtime.cuda.device import CudaDevice
from onnxmesh.runtime.cuda.launchers import Launch
from onnxmesh.runtime.cuda.peer_memory import PeerMemory
from onnxmesh.runtime.nccl import NcclCommunicator
from onnxmesh.runtime.plan import Collective
from onnxmesh.runtime.threads import run_ranks

SPACE = 1 << 20
"""Bytes for each of input, result and staging memory."""
TIMES = (1, 30, 31)
"""Replays of a graph before the result is looked at."""

Prepare = Callable[[Collective, Any, Any], Launch | None]


def check_prepared(comm: NcclCommunicator, axis: str) -> tuple[list[str], int]:
    """What went wrong, and how many checks there were. `axis` spans the whole mesh."""
    device, wrong, count = CudaDevice(comm.groups.world.local_rank, comm.groups), [], 0
    with device.scope():
        arena = peer_memory.allocate(2 * SPACE)
        memory = PeerMemory.share(arena, comm.groups)
        staging = Staging(SPACE)
        ways: dict[str, Prepare] = {
            "NCCL": lambda item, x, out: collectives.prepare(item, [x], [out], comm, staging),
        }
        if memory is not None:
            ways["peer memory"] = lambda item, x, out: peer_collectives.prepare(item, [x], [out], comm, memory)
        else:
            wrong.append("no peer memory")
        for item, piece, want, inverse, dtype in _checks(comm, axis):
            x, out = _view(arena, 0, piece, dtype), _view(arena, SPACE, want, dtype)
            for way, prepare in ways.items():
                launch = prepare(item, x, out)
                if launch is None:
                    wrong += [f"{item.kind} {dtype} is not prepared"] if way == "NCCL" else []
                    continue
                name = f"{item.kind} {item.attrs} {dtype} by {way}"
                wrong += [f"{name} {text}" for text in _differences(device, launch, x, piece, out, want, inverse)]
                count += 1
        if memory is not None:
            memory.close()
    return wrong, count


def _checks(comm: NcclCommunicator, axis: str) -> Iterator[tuple[Collective, np.ndarray, np.ndarray, np.ndarray, str]]:
    """(collective, this rank's input, its result, the result for 7 - input, dtype)."""
    for kind, attrs, held, given in cases(comm.mesh.size):
        item = Collective(kind, axis, (0,), (1,), attrs)
        for batch, dtype in ((1, "bfloat16"), (2, "float32"), (1, "int64"), (2, "float16")):
            pieces = samples(held, given, batch, comm.mesh.size)
            results = [
                run_ranks(comm.mesh, lambda c, given=given: execute(item, given[c.rank], c, np))[comm.rank]  # noqa: B023
                for given in (pieces, [7 - piece for piece in pieces])
            ]
            yield item, pieces[comm.rank], results[0], results[1], dtype


def _view(arena: Any, offset: int, like: np.ndarray, dtype: str) -> Any:
    kind = np.dtype(dtype)
    return arena[offset : offset + prod(like.shape) * kind.itemsize].view(kind).reshape(like.shape)


def _differences(
    device: CudaDevice, launch: Launch, x: Any, piece: np.ndarray, out: Any, want: np.ndarray, inverse: np.ndarray
) -> Iterator[str]:
    """Launched once; then from a graph that changes the input after each time, back to back. Small sums are exact."""
    x[...] = cupy.asarray(piece.astype(x.dtype))
    out.view("u1").fill(0xFF)
    launch(int(device.stream.ptr))
    yield from _compared("launched", device.get(out), want)
    cupy.subtract(7, x, out=x)  # compiles it
    x[...] = cupy.asarray(piece.astype(x.dtype))
    device.synchronize()
    device.stream.begin_capture()
    launch(int(device.stream.ptr))
    cupy.subtract(7, x, out=x)
    graph = device.stream.end_capture()
    done = 0
    for times in TIMES:
        for _ in range(times - done):
            graph.launch(device.stream)
        done = times
        yield from _compared(f"{times} times in a graph", device.get(out), want if times % 2 else inverse)


def _compared(how: str, got: np.ndarray, want: np.ndarray) -> Iterator[str]:
    if not np.array_equal(got.astype(np.float64), want.astype(got.dtype).astype(np.float64)):
        yield f"{how}: {got.reshape(-1)[:8]} for {want.reshape(-1)[:8]}"
