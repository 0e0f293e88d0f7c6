"""Predicted times, in microseconds, of local computation and of collectives on one mesh axis.

A model, not a measurement: a node costs max(flops / rate, bytes / bandwidth), a collective alpha + bytes / beta.
The constants are those of one H200 host with 700 GB/s NVLink, where a collective inside a captured program takes
7 to 10 us and large ones reach 300 GB/s and more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from onnxmesh.compiler.ir import rule
from onnxmesh.compiler.ir.rule import OpView, Shape, Strategy, itemsize
from onnxmesh.runtime.placement import Partial, Placement, Replicate, Shard, local_shape

INFINITE = float("inf")


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of one device and of the links between devices.

    Attributes:
        flops: floating-point operations a microsecond in half precision; float32 takes `float32_factor` as long.
        memory: bytes a microsecond, read plus written.
        link: bytes a microsecond that one rank sends.
        alpha: microseconds that a collective takes at the least, by kind.
        launch: microseconds of a kernel at the least.
    """

    flops: float = 500e6
    float32_factor: float = 8.0
    memory: float = 3.5e6
    link: float = 0.32e6
    all_reduce: float = 10.0
    reduce_scatter: float = 7.0
    all_gather: float = 8.0
    all_to_all: float = 7.0
    shift: float = 8.0
    launch: float = 2.0


H200 = DeviceProfile()


def nbytes(shape: Shape, dtype: str) -> int:
    """Bytes of a tensor."""
    return prod(shape) * itemsize(dtype)


def local_view(view: OpView, strategy: Strategy) -> OpView:
    """The view of one rank's node."""
    ins = tuple(None if s is None else local_shape(s, p, view.ranks) for s, p in zip(view.ins, strategy.ins))
    outs = tuple(local_shape(s, p, view.ranks) for s, p in zip(view.outs, strategy.outs))
    return replace(view, ins=ins, outs=outs)


def flops(view: OpView) -> float:
    """Floating-point operations of a node: those of its rule, or none (memory alone counts)."""
    found = rule.find(view.op)
    return found.flops(view) if found is not None and found.flops is not None else 0.0


def strategy_flops(view: OpView, strategy: Strategy) -> float:
    """Floating-point operations that one rank does under a strategy."""
    steps = view.ranks if strategy.expand == "ring" else 1
    local = local_view(view, strategy)
    if strategy.expand == "ring":
        return _ring_flops(view, local, steps)
    return flops(local)


def _ring_flops(view: OpView, local: OpView, steps: int) -> float:
    """A ring rank sees all keys: its own rows times the whole length."""
    whole, ours = flops(view), flops(local)
    q, mine = view.ins[0], local.ins[0]
    assert q is not None and mine is not None
    return max(ours, whole * mine[2] / q[2]) if steps else ours


def computation(view: OpView, strategy: Strategy, device: DeviceProfile = H200) -> float:
    """Microseconds of one rank's computation, and of what its expansion sends."""
    found = rule.find(view.op)
    if found is not None and not found.moves:
        return 0.0
    local = local_view(view, strategy)
    ins = [nbytes(shape, dtype) for shape, dtype in zip(local.ins, view.in_dtypes) if shape is not None]
    if view.op == "Gather":
        ins = ins[1:]  # only the rows that are looked up are read, and they are as large as the output
    outs = [nbytes(shape, dtype) for shape, dtype in zip(local.outs, view.out_dtypes)]
    rate = device.flops / (device.float32_factor if view.out_dtypes[0] == "float32" else 1.0)
    time = max(strategy_flops(view, strategy) / rate, (sum(ins) + sum(outs)) / device.memory)
    return device.launch + time + _expansion(view, local, strategy, time, device)


def _expansion(view: OpView, local: OpView, strategy: Strategy, time: float, device: DeviceProfile) -> float:
    """What an expansion adds: statistics that are all-reduced, keys that go round."""
    if strategy.expand == "stat_norm":
        rows = prod(local.outs[0][:-1])
        return all_reduce(rows * 4, view.ranks, device) * (2 if view.op == "LayerNormalization" else 1)
    if strategy.expand == "ring":
        sent = sum(nbytes(s, d) for s, d in zip(local.ins[1:3], view.in_dtypes[1:3]) if s is not None)
        step = device.shift + sent / device.link
        merges = 4.0 * nbytes(local.outs[0], "float32") / device.memory
        return (view.ranks - 1) * (max(0.0, step - time / view.ranks) + device.launch) + merges
    if strategy.expand == "split_kv":
        rows = nbytes(local.outs[0], "float32")
        return all_reduce(rows, view.ranks, device) + 2 * all_reduce(rows // local.outs[0][-1], view.ranks, device)
    return 0.0


def all_reduce(size: int, ranks: int, device: DeviceProfile = H200) -> float:
    """Microseconds to all-reduce `size` bytes a rank."""
    return device.all_reduce + 2 * size * (ranks - 1) / ranks / device.link


def reshard(size: int, before: Placement, after: Placement, ranks: int, device: DeviceProfile = H200) -> float:
    """Microseconds to change the placement of a tensor of `size` global bytes; infinite where it cannot be."""
    if before == after:
        return 0.0
    moved = size * (ranks - 1) / ranks / device.link
    if isinstance(before, Replicate):
        return INFINITE if isinstance(after, Partial) else 0.01 + size / ranks / device.memory
    if isinstance(after, Partial):
        return INFINITE
    if isinstance(before, Partial):
        if isinstance(after, Replicate):
            return all_reduce(size, ranks, device)
        if before.op != "sum":
            return all_reduce(size, ranks, device)
        return device.reduce_scatter + moved * _repeats(after, ranks)
    if isinstance(after, Shard) and exchanged(before, after):
        return device.all_to_all + moved / ranks * _repeats(before, ranks) * _repeats(after, ranks)
    return device.all_gather + moved + 2 * size / device.memory


def exchanged(before: Shard, after: Shard) -> bool:
    """Whether a change of shards is an all-to-all; else it is a gather and a local slice."""
    return before.dim != after.dim


def _repeats(placement: Shard, ranks: int) -> float:
    """How often an element is held, on average: segments that several ranks hold are sent to each of them."""
    return placement.local(ranks) * ranks / placement.size
