"""Expansions: local computations of strategies where the op itself, run on local shapes, is not enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.rule import OpView, Strategy
from onnxmesh.compiler.ir.view import dtype_of, numpy_dtype, shape_of
from onnxmesh.passes.graph.constants import recipe_of
from onnxmesh.passes.partition.local import F32, Local, Types, Values, given, required
from onnxmesh.passes.partition.statistics import arg, log_sum_exp, mean, norm, softmax, stat_norm
from onnxmesh.runtime.placement import Replicate, Segments, Shard, ranges

Expansion = Callable[[Local, OpView, Strategy, Values, Types], Sequence[ir.Value]]
ATTRIBUTES = ("scale", "softcap", "masked_row", "qk_dtype")
"""What an AttentionBlock takes over from its Attention."""


def masked_gather(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """Look up the rows that this rank has; rows of others give zero, and the sum over ranks is the result."""
    (dtype, shape), table, index = outs[0], required(ins, 0), required(ins, 1)
    placement = strategy.ins[0]
    assert isinstance(placement, Shard) and view.ins[0] is not None
    kind, size = dtype_of(index), shape_of(index) or (1,)

    def op(name: str, a: ir.Value, b: ir.Value, out: str = kind) -> ir.Value:
        return local.one(name, [a, b], out, size, domain="")

    def number(value: int) -> ir.Value:
        return local.constant(np.array(value, kind))

    zero = number(0)
    if not shape_of(index):
        index = local.one("Reshape", [index], kind, size)
    wrapped = op("Add", index, number(view.ins[0][0]))
    index = local.one("Where", [op("Less", index, zero, "bool"), wrapped, index], kind, size, domain="")
    row: ir.Value | None = None
    here: ir.Value | None = None
    for low, high, offset in _bounds(placement.segments, local.ranks):
        first, last, shift = (
            local.constant(np.array(x, kind), Shard.plain(0, local.ranks)) for x in (low, high, offset)
        )
        inside = op("And", op("GreaterOrEqual", index, first, "bool"), op("Less", index, last, "bool"), "bool")
        found = local.one("Where", [inside, op("Sub", index, shift), zero], kind, size, domain="")
        row = found if row is None else op("Add", row, found)
        here = inside if here is None else op("Or", here, inside, "bool")
    assert row is not None and here is not None
    width = view.ins[0][1:]
    rows = local.one("Gather", [table, row], dtype, (*size, *width), domain="", axis=0)
    here = local.one("Reshape", [here], "bool", (*size, *(1,) * len(width)))
    nothing = local.constant(np.zeros((), numpy_dtype(dtype)))
    result = local.one("Where", [here, rows, nothing], dtype, (*size, *width), domain="")
    return [result if shape_of(result) == tuple(shape) else local.one("Reshape", [result], dtype, shape)]


def _bounds(segments: Segments, ranks: int) -> list[tuple[list[int], list[int], list[int]]]:
    """For every segment and rank: first and last global row that the rank has, and global minus local row."""
    starts = list(accumulate((s.local(ranks) for s in segments), initial=0))
    parts = [ranges(segments, ranks, rank) for rank in range(ranks)]
    return [
        (
            [part[i][0] for part in parts],
            [part[i][1] for part in parts],
            [part[i][0] - starts[i] for part in parts],
        )
        for i in range(len(segments))
    ]


class _Blocks:
    """Attention in blocks of keys, merged as they come."""

    def __init__(self, local: Local, view: OpView, ins: Values, outs: Types) -> None:
        self.local, self.ins, self.with_statistics = local, ins, len(outs) > 1
        self.dtype, self.shape = outs[0]
        self.row = (*self.shape[:3], 1)
        self.attrs = {name: value for name, value in view.attrs if name in ATTRIBUTES}
        self.masked_row = view.attr("masked_row", "nan")
        self.state: Sequence[ir.Value] | None = None

    @property
    def types(self) -> Types:
        return [(self.dtype, self.shape), (F32, self.row), (F32, self.row)]

    def add(self, k: ir.Value, v: ir.Value, mask: ir.Value | None, k_pos: ir.Value | None) -> None:
        """Attend to one more block of keys."""
        q_pos = given(self.ins, 4) if k_pos is not None else None
        block = self.local.op(
            "AttentionBlock", [required(self.ins, 0), k, v, mask, q_pos, k_pos], self.types, **self.attrs
        )
        if self.state is None:
            self.state = block
        else:
            self.state = self.local.op("AttentionMerge", [*self.state, *block], self.types)

    def finish(self) -> Sequence[ir.Value]:
        """The attention over all blocks, with its statistics where they are wanted."""
        assert self.state is not None
        o, _, total = self.state
        if self.with_statistics:
            return self.state
        if self.masked_row != "nan":
            return [o]
        return [self.local.one("AttentionFinish", [o, total], self.dtype, self.shape, masked_row=self.masked_row)]


def ring(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """Keys and values go round the axis while every rank attends to the block that is with it.

    Liu et al., Ring Attention with Blockwise Transformers (2023). Keys that every rank holds are attended to once.
    """
    placement = strategy.ins[1]
    assert isinstance(placement, Shard)
    segments, ranks = placement.segments, local.ranks
    blocks = _Blocks(local, view, ins, outs)
    own = [i for i, s in enumerate(segments) if s.copies < ranks]
    common = [i for i, s in enumerate(segments) if s.copies == ranks]
    k, v = (_parts(local, required(ins, i), segments, own) for i in (1, 2))
    if common:
        keys, values = (_parts(local, required(ins, i), segments, common) for i in (1, 2))
        columns = _columns(segments, ranks, 0, common)
        blocks.add(keys, values, _take(local, given(ins, 3), columns, 3), _take(local, given(ins, 5), columns, 0))
    for step in range(ranks):
        if step:
            k, v = (
                local.collective("Shift", x, shape_of(x), offset=1, reason=f"ring attention, step {step}")
                for x in (k, v)
            )
        columns = _columns(segments, ranks, step, own)
        blocks.add(k, v, _take(local, given(ins, 3), columns, 3), _take(local, given(ins, 5), columns, 0))
    return blocks.finish()


def _columns(segments: Segments, ranks: int, step: int, kept: Sequence[int]) -> list[list[int]]:
    """For every rank, the global keys that are with it after `step` shifts."""
    result = []
    for rank in range(ranks):
        owned = ranges(segments, ranks, (rank - step) % ranks)
        result.append([key for i in kept for key in range(*owned[i])])
    return result


def _take(local: Local, value: ir.Value | None, columns: list[list[int]], axis: int) -> ir.Value | None:
    """The columns of `value` that belong to the keys at hand: of a constant a constant, else a Gather.

    Positions that are constants on every step tell a backend while it loads which blocks are hidden, whole or causal.
    """
    if value is None or shape_of(value)[axis] == 1:
        return value
    key = (value, tuple(map(tuple, columns)), axis)
    if key not in local.memo:
        if _may_be_cut(local, value, axis):
            local.memo[key] = _rolled(local, value, columns, axis)
        else:
            local.memo[key] = _gathered(local, value, columns, axis)
    return local.memo[key]


def _may_be_cut(local: Local, value: ir.Value, axis: int) -> bool:
    """Whether it is a constant that is whole on this mesh axis, and along this dim on the others too."""
    if not any(value is constant for constant in local.initializers):
        return False
    spec = value.meta.get("spec", ())
    return all(
        isinstance(placement, Replicate)
        or (isinstance(placement, Shard) and placement.dim != axis and mesh_axis != local.axis)
        for mesh_axis, placement in spec
    )


def _rolled(local: Local, value: ir.Value, columns: list[list[int]], axis: int) -> ir.Value:
    """A constant of the columns of all ranks, one after the other, of which every rank has its own."""
    pieces = [
        recipes.slice_(recipe_of(value), axis, start, stop)
        for start, stop in _runs([c for own in columns for c in own])
    ]
    recipe = pieces[0] if len(pieces) == 1 else recipes.concat(pieces, axis)
    shape, whole = list(shape_of(value)), list(value.meta.get("global_shape", shape_of(value)))
    shape[axis], whole[axis] = len(columns[0]), sum(map(len, columns))
    cut = (local.axis, Shard.plain(axis, whole[axis]))
    result = ir.Value(name=f"{local.axis}_rolled_{len(local.memo)}", shape=ir.Shape(shape), type=value.type)
    result.meta["recipe"], result.meta["global_shape"] = recipe, tuple(whole)
    earlier = [entry for entry in value.meta.get("spec", ()) if entry[0] != local.axis]
    result.meta["spec"] = (*earlier, cut)
    local.initializers.append(result)
    return result


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The numbers as ranges [start, stop) of neighbours."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _gathered(local: Local, value: ir.Value, columns: list[list[int]], axis: int) -> ir.Value:
    """The columns by an index that differs from rank to rank."""
    flat = np.array(columns, np.int64).reshape(-1)
    index = local.constant(flat, Shard.plain(0, flat.size))
    shape = list(shape_of(value))
    shape[axis] = len(columns[0])
    return local.one("Gather", [value, index], dtype_of(value), shape, domain="", axis=axis)


def _parts(local: Local, value: ir.Value, segments: Segments, kept: Sequence[int]) -> ir.Value:
    """The local parts of some segments of dim 2, joined."""
    if len(kept) == len(segments):
        return value
    shape, dtype = shape_of(value), dtype_of(value)
    sizes = [s.local(local.ranks) for s in segments]
    starts = list(accumulate(sizes, initial=0))
    pieces = []
    for i in kept:
        size = (*shape[:2], sizes[i], *shape[3:])
        pieces.append(local.one("Slice", [value], dtype, size, axes=[2], starts=[starts[i]], steps=[1]))
    if len(pieces) == 1:
        return pieces[0]
    size = (*shape[:2], sum(sizes[i] for i in kept), *shape[3:])
    return local.one("Concat", pieces, dtype, size, domain="", axis=2)


def split_kv(local: Local, view: OpView, strategy: Strategy, ins: Values, outs: Types) -> Sequence[ir.Value]:
    """Every rank attends to its own keys; the results are merged by their log-sum-exp with three all-reduces."""
    (dtype, shape) = outs[0]
    row = (*shape[:3], 1)
    blocks = _Blocks(local, view, ins, outs)
    blocks.add(required(ins, 1), required(ins, 2), _counted_once(local, strategy, ins, blocks), given(ins, 5))
    assert blocks.state is not None
    o, m, total = blocks.state

    def op(name: str, values: Values, size: Sequence[int]) -> ir.Value:
        return local.one(name, values, F32, size, domain="")

    def reduce(value: ir.Value, how: str, size: Sequence[int]) -> ir.Value:
        return local.collective("AllReduce", value, size, reduce=how, reason="attention over sharded keys")

    lowest = local.scalar(float(np.finfo(np.float32).min))
    top = op("Max", [reduce(m, "max", row), lowest], row)
    weight = op("Mul", [total, op("Exp", [op("Sub", [m, top], row)], row)], row)
    weights = reduce(weight, "sum", row)
    wide = reduce(op("Mul", [local.cast(o, F32), weight], shape), "sum", shape)
    safe = op("Max", [weights, local.scalar(float(np.finfo(np.float32).tiny))], row)
    result = local.cast(op("Div", [wide, safe], shape), dtype)
    if blocks.masked_row == "nan":
        result = local.one("AttentionFinish", [result, weights], dtype, shape, masked_row="nan")
    return [result]


def _counted_once(local: Local, strategy: Strategy, ins: Values, blocks: _Blocks) -> ir.Value | None:
    """The mask, which hides the keys that every rank holds from all ranks but the first."""
    placement, mask = strategy.ins[1], given(ins, 3)
    assert isinstance(placement, Shard)
    if not placement.has_copies:
        return mask
    hidden = np.zeros((local.ranks, placement.local(local.ranks)), np.float32)
    start = 0
    for segment in placement.segments:
        size = segment.local(local.ranks)
        hidden[1:, start : start + size] = -np.inf if segment.copies > 1 else 0.0
        start += size
    extra = local.constant(hidden.reshape(1, 1, 1, -1), Shard.plain(3, hidden.size))
    if mask is None:
        return extra
    shape = (*shape_of(mask)[:3], hidden.shape[1])
    if dtype_of(mask) == "bool":
        lowest = float(np.finfo(np.float32).min) if blocks.masked_row == "uniform" else -np.inf
        choice = [mask, local.scalar(0.0), local.scalar(lowest)]
        mask = local.one("Where", choice, F32, shape_of(mask), domain="")
    return local.one("Add", [local.cast(mask, F32), extra], F32, shape, domain="")


EXPANSIONS: dict[str, Expansion] = {
    "mean": mean,
    "stat_norm": stat_norm,
    "softmax": softmax,
    "norm": norm,
    "log_sum_exp": log_sum_exp,
    "arg": arg,
    "masked_gather": masked_gather,
    "ring": ring,
    "split_kv": split_kv,
}
