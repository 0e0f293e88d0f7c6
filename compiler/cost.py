"""Predicted times, in microseconds, of local computation and of collectives on one mesh axis.

Two models over a device profile (runtime/profile.py). `computation` and `reshard` price a choice of placement: they
grow evenly with the work, so that a choice never hangs on a count of tiles, and use round numbers unless a profile is
named, so that plans stay the same when one is measured anew. `execution` is the best guess at what one instruction
takes on one rank: it knows about tiles and waves, and is what reports show.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from importlib import resources
from math import prod

from onnxmesh.compiler.ir import rule
from onnxmesh.compiler.ir.rule import OpView, Shape, Strategy, itemsize
from onnxmesh.runtime import profile
from onnxmesh.runtime.cuda.gemm_epilogue import splits
from onnxmesh.runtime.placement import Partial, Placement, Replicate, Shard, local_shape
from onnxmesh.runtime.profile import Attention, Curve, DeviceProfile, Gemm

INFINITE = float("inf")
VARIABLE = "ONNXMESH_PROFILE"
"""The environment variable that names the device profile to compile for."""

_RATES = {"float32": 62.5e6, "float16": 500e6, "bfloat16": 500e6}
_ALPHAS = {"AllReduce": 10.0, "ReduceScatter": 7.0, "AllGather": 8.0, "AllToAll": 7.0, "Shift": 8.0}

GENERIC = DeviceProfile(
    name="generic",
    processors=132,
    gemm={dtype: Gemm(rate, 3.5e6, 2.0) for dtype, rate in _RATES.items()},
    attention={dtype: Attention(rate, rate, 3.5e6, 2.0) for dtype, rate in _RATES.items()},
    memory=Curve.line(2.0, 3.5e6),
    links={kind: {2: Curve.line(alpha, 0.32e6)} for kind, alpha in _ALPHAS.items()},
)
"""Round numbers of a host of large GPUs with fast links between all of them, for where nothing was measured."""

_current: ContextVar[DeviceProfile | None] = ContextVar("onnxmesh_device_profile", default=None)
_placing: ContextVar[DeviceProfile] = ContextVar("onnxmesh_placing_profile", default=GENERIC)


@contextmanager
def on(device: DeviceProfile | None) -> Iterator[None]:
    """Within it times are those of `device`; None: of the default."""
    named = device or _named()
    current, placing = _current.set(named or _shipped()), _placing.set(named or GENERIC)
    try:
        yield
    finally:
        _current.reset(current)
        _placing.reset(placing)


def current() -> DeviceProfile:
    """The profile that times are predicted with."""
    return _current.get() or default()


def default() -> DeviceProfile:
    """The profile of the file that ONNXMESH_PROFILE names; else the one that comes with the package.

    Raises:
        InvalidArgument: the file cannot be read.
    """
    return _named() or _shipped()


def _named() -> DeviceProfile | None:
    path = os.environ.get(VARIABLE)
    return profile.load(path) if path else None


@cache
def _shipped() -> DeviceProfile:
    path = resources.files("onnxmesh.compiler") / "profiles" / "h200.json"
    with resources.as_file(path) as file:
        return profile.load(file) if file.exists() else GENERIC


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
    local = local_view(view, strategy)
    ours = flops(local)
    if strategy.expand != "ring":
        return ours
    q, mine = view.ins[0], local.ins[0]
    assert q is not None and mine is not None
    return max(ours, flops(view) * mine[2] / q[2])  # its own rows, and all keys


# --- placement: what a choice costs ---------------------------------------------------------------------------


def computation(view: OpView, strategy: Strategy, device: DeviceProfile | None = None) -> float:
    """Microseconds of one rank's computation, and of what its expansion sends."""
    device = device or _placing.get()
    if _is_view(view):
        return 0.0
    local = local_view(view, strategy)
    rate = _rate(view, device)
    time = max(strategy_flops(view, strategy) / rate, traffic(local) / device.memory.rate)
    return device.launch + time + _expansion(view, local, strategy, time, device)


def _rate(view: OpView, device: DeviceProfile) -> float:
    models = device.attending if view.op.startswith("Attention") else device.product
    return float(models(view.out_dtypes[0]).rate)


def _is_view(view: OpView) -> bool:
    found = rule.find(view.op)
    return found is not None and not found.moves


def traffic(view: OpView) -> int:
    """Bytes that a node reads and writes."""
    ins = [nbytes(shape, dtype) for shape, dtype in zip(view.ins, view.in_dtypes) if shape is not None]
    if view.op == "Gather":
        ins = ins[1:]  # only the rows that are looked up are read, and they are as large as the output
    return sum(ins) + sum(nbytes(shape, dtype) for shape, dtype in zip(view.outs, view.out_dtypes))


_STATISTICS = {"softmax": 2, "log_sum_exp": 2, "norm": 1, "arg": 1}
"""How many numbers a row these expansions all-reduce."""


def _expansion(view: OpView, local: OpView, strategy: Strategy, time: float, device: DeviceProfile) -> float:
    """What an expansion adds: statistics that are all-reduced, keys that go round."""
    if strategy.expand == "stat_norm":
        rows = prod(local.outs[0][:-1])
        return all_reduce(rows * 4, view.ranks, device) * (2 if view.op == "LayerNormalization" else 1)
    if strategy.expand in _STATISTICS:
        row = local.outs[0][int(view.attr("axis", -1))] if strategy.expand == "softmax" else 1
        size = nbytes(local.outs[0], "float32") // row
        return all_reduce(size, view.ranks, device) * _STATISTICS[strategy.expand]
    if strategy.expand == "ring":
        sent = sum(nbytes(s, d) for s, d in zip(local.ins[1:3], view.in_dtypes[1:3]) if s is not None)
        step = device.link("Shift", view.ranks)(sent)
        merges = 4.0 * nbytes(local.outs[0], "float32") / device.memory.rate
        return (view.ranks - 1) * (max(0.0, step - time / view.ranks) + device.launch) + merges
    if strategy.expand == "split_kv":
        rows = nbytes(local.outs[0], "float32")
        return all_reduce(rows, view.ranks, device) + 2 * all_reduce(rows // local.outs[0][-1], view.ranks, device)
    return 0.0


def sent(kind: str, before: float, after: float, ranks: int) -> float:
    """Bytes that one rank sends in a collective, by the ring or pairwise algorithm.

    Args:
        before, after: bytes of what a rank gives and gets. A piece that every rank holds is not sent.
    """
    if kind == "AllReduce":
        return 2 * before * (ranks - 1) / ranks
    if kind in ("AllGather", "GatherTo"):
        return after - before
    return before if kind in ("Shift", "Broadcast") else before * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int, device: DeviceProfile | None = None) -> float:
    """Microseconds to all-reduce `size` bytes a rank."""
    return (device or _placing.get()).link("AllReduce", ranks)(sent("AllReduce", size, size, ranks))


def reshard(size: int, before: Placement, after: Placement, ranks: int, device: DeviceProfile | None = None) -> float:
    """Microseconds to change the placement of a tensor of `size` global bytes; infinite where it cannot be."""
    if before == after:
        return 0.0
    device = device or _placing.get()
    moved = size * (ranks - 1) / ranks
    if isinstance(before, Replicate):
        return INFINITE if isinstance(after, Partial) else 0.01 + size / ranks / device.memory.rate
    if isinstance(after, Partial):
        return INFINITE
    if isinstance(before, Partial):
        if isinstance(after, Replicate) or before.op != "sum":
            return all_reduce(size, ranks, device)
        return device.link("ReduceScatter", ranks)(moved * _repeats(after, ranks))
    if isinstance(after, Shard) and exchanged(before, after):
        return device.link("AllToAll", ranks)(moved / ranks * _repeats(before, ranks) * _repeats(after, ranks))
    return device.link("AllGather", ranks)(moved) + 2 * size / device.memory.rate


def exchanged(before: Shard, after: Shard) -> bool:
    """Whether a change of shards is an all-to-all; else it is a gather and a local slice."""
    return before.dim != after.dim


def _repeats(placement: Shard, ranks: int) -> float:
    """How often an element is held, on average: segments that several ranks hold are sent to each of them."""
    return placement.local(ranks) * ranks / placement.size


# --- prediction: what an instruction takes --------------------------------------------------------------------


def execution(view: OpView, device: DeviceProfile | None = None) -> float:
    """Microseconds of one rank's node; 0 for one that only renames bytes."""
    device = device or current()
    if _is_view(view):
        return 0.0
    size, dtype = traffic(view), view.out_dtypes[0]
    if view.op in ("MatMul", "FusedMatMul"):
        return device.product(dtype)(*_product(view), size, device.processors) + _rest(view, device)
    if view.op in ("Attention", "AttentionBlock"):
        return _attention(view, size, device)
    work = flops(view)
    return max(device.memory(size), device.product(dtype).overhead + work / device.product(dtype).rate if work else 0)


def _product(view: OpView) -> tuple[int, int, int, int]:
    """(batch, m, n, k): with one matrix for all rows they are one product, as with a weight."""
    a, b, out = view.ins[0], view.ins[1], view.outs[0]
    assert a is not None and b is not None
    n = b[-1] if len(b) > 1 else 1
    rows = prod(out) // n if n else 0
    m = rows if prod(b[:-2]) == 1 else a[-2] if len(a) > 1 else 1
    return rows // m if m else 0, m, n, a[-1]


def _rest(view: OpView, device: DeviceProfile) -> float:
    """What a FusedMatMul does after the product's own epilogue: one more kernel, in place."""
    if view.op == "MatMul":
        return 0.0
    product = (*view.outs[0][:-1], view.ins[1][-1]) if view.ins[1] else view.outs[0]
    if splits(json.loads(view.attr("expr")), view.ins, product)[0].rest is None:
        return 0.0
    more = [nbytes(shape, dtype) for shape, dtype in zip(view.ins[2:], view.in_dtypes[2:]) if shape is not None]
    return device.memory(2 * nbytes(view.outs[0], view.out_dtypes[0]) + sum(more))


def _attention(view: OpView, size: int, device: DeviceProfile) -> float:
    q, k, v = view.ins[:3]
    assert q is not None and k is not None and v is not None
    causal = view.op == "Attention" and len(view.ins) > 4 and view.ins[4] is not None and q[2] == k[2]
    model = device.attending(view.out_dtypes[0])
    return model(
        q[0] * q[1], q[2], k[2], q[3] + v[3], causal=causal, nbytes=size, processors=device.processors
    )  # fmt: skip
