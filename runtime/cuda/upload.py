"""A rank's weights, from files, from the model, or random, into one piece of the GPU's memory.

Files are read by a few threads, tensor by tensor, each straight into pinned memory: while one chunk of it is copied to
the GPU the next one is read and hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import prod
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from onnxmesh.runtime import random_weights
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.hosted import storage
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.kernels.registry import Array
from onnxmesh.runtime.memory import aligned
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.recipe import Fetch
from onnxmesh.runtime.serialize import StoredShard, made_shards, stored_shards
from onnxmesh.runtime.validate import shard_key, weight_entry

_CHUNK = 8 << 20
_LANES = 4


def load(source: Fetch | str | Path, plan: Plan, coordinate: Mapping[str, int]) -> list[Array]:
    """The weights of the rank at `coordinate` on the current device, in the order of the plan's; complete.

    They are views of one allocation, each at a multiple of 256 bytes.

    Raises:
        PlanError: as onnxmesh.runtime.serialize.load_weights.
    """
    weights = _allocate(plan)
    if source == random_weights.RANDOM:
        for weight, target in zip(plan.weights, weights):
            _draw(target, random_weights.seed(weight.name, shard_key(weight.spec, plan.mesh, coordinate)))
        import_cupy().cuda.get_current_stream().synchronize()
    elif isinstance(source, str | Path):
        with stored_shards(source, plan, coordinate) as shards:
            _upload_files(shards, weights)
    else:
        _upload_arrays(made_shards(source, plan, coordinate), weights)
    return weights


def _allocate(plan: Plan) -> list[Array]:
    entries = [weight_entry(weight, plan.mesh) for weight in plan.weights]
    types = [(storage(dtype(name)), shape) for name, shape in entries]
    sizes = [prod(shape) * kind.itemsize for kind, shape in types]
    memory = import_cupy().empty(sum(map(aligned, sizes)), "u1")
    arrays, offset = [], 0
    for (kind, shape), size in zip(types, sizes):
        arrays.append(memory[offset : offset + size].view(kind).reshape(shape))
        offset += aligned(size)
    return arrays


class _Lane:
    """A stream with two chunks of pinned memory: one is filled while the other is copied."""

    def __init__(self) -> None:
        self._cupy = import_cupy()
        cuda = self._cupy.cuda
        self._stream = cuda.Stream(non_blocking=True)
        pinned = [cuda.PinnedMemoryPointer(cuda.PinnedMemory(_CHUNK), 0) for _ in range(2)]
        self._free = [(np.frombuffer(memory, np.uint8, _CHUNK), cuda.Event(disable_timing=True)) for memory in pinned]

    def send(self, target: Array, fill: Callable[[np.ndarray, int], object]) -> None:
        """Copy to a row-major array what `fill(chunk, start)` puts into chunks of bytes, from byte `start` on."""
        runtime = self._cupy.cuda.runtime
        for start in range(0, target.nbytes, _CHUNK):
            memory, copied = self._free.pop(0)
            copied.synchronize()
            chunk = memory[: min(_CHUNK, target.nbytes - start)]
            fill(chunk, start)
            runtime.memcpyAsync(
                int(target.data.ptr) + start,
                chunk.ctypes.data,
                chunk.nbytes,
                runtime.memcpyHostToDevice,
                self._stream.ptr,
            )
            copied.record(self._stream)
            self._free.append((memory, copied))

    def finish(self) -> None:
        """Wait until everything is there."""
        self._stream.synchronize()


def _upload_files(shards: Sequence[StoredShard], targets: Sequence[Array]) -> None:
    work: SimpleQueue[tuple[StoredShard, Array]] = SimpleQueue()
    for pair in sorted(zip(shards, targets), key=lambda pair: -pair[0].nbytes):
        work.put(pair)
    device = int(import_cupy().cuda.Device().id)
    with ThreadPoolExecutor(_LANES, "onnxmesh-load") as pool:
        for lane in [pool.submit(_drain, work, device) for _ in range(min(_LANES, len(shards)))]:
            lane.result()


def _drain(work: SimpleQueue[tuple[StoredShard, Array]], device: int) -> None:
    """One thread: upload shards until there are no more."""
    with import_cupy().cuda.Device(device):
        lane = _Lane()
        try:
            while True:
                _upload_file(lane, *work.get_nowait())
        except Empty:
            lane.finish()


def _upload_file(lane: _Lane, shard: StoredShard, target: Array) -> None:
    sha256 = hashlib.sha256()

    def fill(chunk: np.ndarray, start: int) -> None:
        shard.read_into(chunk.data, start)
        sha256.update(chunk.data)

    lane.send(target, fill)
    shard.check(sha256.hexdigest())


def _upload_arrays(shards: Iterable[np.ndarray], targets: Sequence[Array]) -> None:
    lane = _Lane()
    for shard, target in zip(shards, targets, strict=True):
        lane.send(target, partial(_fill, np.ascontiguousarray(shard).reshape(-1).view(np.uint8)))
    lane.finish()


def _fill(data: np.ndarray, chunk: np.ndarray, start: int) -> None:
    chunk[...] = data[start : start + chunk.size]


@cache
def _normal() -> Any:
    """As runtime/random_weights.py does it on the host, for number `i` of a shard."""
    source = f"""
        unsigned long long z = seed + (i + 1ull) * {random_weights.GAMMA}ull;
        z = (z ^ (z >> 30)) * {random_weights.FIRST}ull;
        z = (z ^ (z >> 27)) * {random_weights.SECOND}ull;
        z ^= z >> 31;
        int total = (int)(z & 0xffff) + (int)((z >> 16) & 0xffff) + (int)((z >> 32) & 0xffff) + (int)(z >> 48);
        y = (float)(total - {random_weights.CENTRE}) * {random_weights.SCALE:.9g}f;
    """
    return import_cupy().ElementwiseKernel("uint64 seed", "float32 y", source, "onnxmesh_random_weights")


_PART = 1 << 26
"""Numbers that are made in float32 before they are rounded to another dtype."""


def _draw(target: Array, first: int) -> None:
    if not random_weights.is_drawn(np.dtype(target.dtype)):
        target.fill(0)
        return
    cupy, flat = import_cupy(), target.reshape(-1)
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        # Numbers from `start` on: the hash adds GAMMA once for each.
        seed = np.uint64((first + start * random_weights.GAMMA) % 2**64)
        part[...] = _normal()(seed, cupy.empty(part.shape, cupy.float32)).astype(part.dtype)
