"""Expansions of ops that need a statistic of a dim that is cut: one or two numbers a row are all-reduced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.ir.rule import OpView, Strategy
from onnxmesh.compiler.ir.view import dtype_of, shape_of
from onnxmesh.passes.partition.local import F32, Local, Types, Values, given, required
from onnxmesh.runtime.placement import Shard, ranges


def mean(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """A rank's share of a mean: its own sum over the global count."""
    (dtype, shape), x = outs[0], required(ins, 0)
    axes = list(view.attr("axes"))
    count = np.prod([view.ins[0][axis] for axis in axes])  # type: ignore[index]
    wide = local.cast(x, F32)
    total = local.one("ReduceSum", [wide], F32, shape, axes=axes, keepdims=int(view.attr("keepdims", 1)))
    scaled = local.one("Mul", [total, local.scalar(1.0 / count)], F32, shape, domain="")
    return [local.cast(scaled, dtype)]


def stat_norm(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """RMS- or LayerNormalization over a dim that is cut: the statistics of a row are all-reduced, in float32."""
    (dtype, shape), x = outs[0], required(ins, 0)
    assert view.ins[0] is not None
    row = (*shape[:-1], 1)
    share = local.scalar(1.0 / view.ins[0][-1])

    def average(value: ir.Value) -> ir.Value:
        total = local.one("ReduceSum", [value], F32, row, axes=[len(shape) - 1], keepdims=1)
        reason = f"{view.op}: one statistic a row, its dim is sharded"
        total = local.collective("AllReduce", total, row, reduce="sum", reason=reason)
        return local.one("Mul", [total, share], F32, row, domain="")

    def binary(op: str, a: ir.Value, b: ir.Value, kind: str, size: Sequence[int]) -> ir.Value:
        return local.one(op, [a, b], kind, size, domain="")

    wide = local.cast(x, F32)
    if view.op == "LayerNormalization":
        wide = binary("Sub", wide, average(wide), F32, shape)
    epsilon = local.scalar(float(view.attr("epsilon", 1e-5)))
    variance = binary("Add", average(binary("Mul", wide, wide, F32, shape)), epsilon, F32, row)
    deviation = local.one("Sqrt", [variance], F32, row, domain="")
    result = binary("Div", wide, deviation, F32, shape)
    scale, bias = given(ins, 1), given(ins, 2)
    if scale is not None:
        result = binary("Mul", result, local.cast(scale, F32), F32, shape)
    if bias is not None:
        result = binary("Add", result, local.cast(bias, F32), F32, shape)
    return [local.cast(result, dtype)]


def softmax(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """Softmax, LogSoftmax over a dim that is cut: a row's maximum and its sum of exponentials, in float32."""
    (dtype, shape), axis = outs[0], int(view.attr("axis", -1)) % len(outs[0][1])
    row = tuple(1 if i == axis else size for i, size in enumerate(shape))
    kind = "float64" if dtype == "float64" else F32
    x = local.cast(required(ins, 0), kind)
    top = _over_ranks(local, view, _reduced(local, x, "Max", row, axis), "max")
    shifted = local.one("Sub", [x, top], kind, shape, domain="")
    powers = local.one("Exp", [shifted], kind, shape, domain="")
    total = _over_ranks(local, view, _reduced(local, powers, "Sum", row, axis), "sum")
    if view.op == "Softmax":
        result = local.one("Div", [powers, total], kind, shape, domain="")
    else:
        logs = local.one("Log", [total], kind, row, domain="")
        result = local.one("Sub", [shifted, logs], kind, shape, domain="")
    return [local.cast(result, dtype)]


def norm(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """ReduceL2, ReduceLogSum: a function of a sum, which is all-reduced before it, in float32."""
    dtype, shape = outs[0]
    kind = "float64" if dtype == "float64" else F32
    of, then = ("SumSquare", "Sqrt") if view.op == "ReduceL2" else ("Sum", "Log")
    x = local.cast(required(ins, 0), kind)
    keepdims = int(view.attr("keepdims", 1))
    total = local.one(f"Reduce{of}", [x], kind, shape, axes=list(view.attr("axes")), keepdims=keepdims)
    total = _over_ranks(local, view, total, "sum")
    return [local.cast(local.one(then, [total], kind, shape, domain=""), dtype)]


def log_sum_exp(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """ReduceLogSumExp: the maximum of all, and the sum of exponentials below it, in float32."""
    (dtype, shape), axes = outs[0], list(view.attr("axes"))
    kind = "float64" if dtype == "float64" else F32
    x = local.cast(required(ins, 0), kind)
    row = tuple(1 if i in axes else size for i, size in enumerate(shape_of(x)))

    def op(name: str, *values: ir.Value, size: Sequence[int] = row) -> ir.Value:
        return local.one(name, values, kind, size, domain="")

    top = _over_ranks(local, view, local.one("ReduceMax", [x], kind, row, axes=axes, keepdims=1), "max")
    infinite = local.one("IsInf", [top], "bool", row, domain="")
    top = op("Where", infinite, local.scalar(0.0, kind), top)
    powers = op("Exp", op("Sub", x, top, size=shape_of(x)), size=shape_of(x))
    total = _over_ranks(local, view, local.one("ReduceSum", [powers], kind, row, axes=axes, keepdims=1), "sum")
    result = local.cast(op("Add", op("Log", total), top), dtype)
    return [result if row == tuple(shape) else local.one("Reshape", [result], dtype, shape)]


def arg(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """ArgMax, ArgMin over a dim that is cut: of the ranks with the best value the first (or last) position counts.

    A rank with a worse value than the best gives a position past the end (or before the start), and the least (or
    greatest) of all is the result.
    """
    (kind, shape), x, placement = outs[0], required(ins, 0), strategy.ins[0]
    assert isinstance(placement, Shard)
    axis, keepdims = placement.dim, int(view.attr("keepdims", 1))
    last, reduction = bool(view.attr("select_last_index", 0)), view.op.removeprefix("Arg")
    mine = local.one(f"Reduce{reduction}", [x], dtype_of(x), shape, axes=[axis], keepdims=keepdims)
    best = _over_ranks(local, view, mine, reduction.lower())
    flags = {"axis": axis, "keepdims": keepdims, "select_last_index": int(last)}
    index = local.one(view.op, [x], kind, shape, domain="", **flags)
    places = [
        [i for part in ranges(placement.segments, local.ranks, rank) for i in range(*part)]
        for rank in range(local.ranks)
    ]
    flat = np.array(places, np.int64).reshape(-1)
    index = local.one(
        "Gather", [local.constant(flat, Shard.plain(0, flat.size)), index], kind, shape, domain="", axis=0
    )
    worse = local.one("Less" if reduction == "Max" else "Greater", [mine, best], "bool", shape, domain="")
    nowhere = local.scalar(-1 if last else placement.size, kind)
    return [local.one("Where", [worse, nowhere, index], kind, shape, domain="")]


def _reduced(local: Local, x: ir.Value, how: str, row: Sequence[int], axis: int) -> ir.Value:
    return local.one(f"Reduce{how}", [x], dtype_of(x), row, axes=[axis], keepdims=1)


def _over_ranks(local: Local, view: OpView, value: ir.Value, how: str) -> ir.Value:
    reason = f"{view.op}: a statistic of a dim that is sharded"
    return local.collective("AllReduce", value, shape_of(value), reduce=how, reason=reason)
