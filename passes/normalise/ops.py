"""Rules that turn ONNX ops whose meaning depends on numbers in inputs into ops of the normal form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.constants import fill_weight
from onnxmesh.passes.graph.deciding import value_hint
from onnxmesh.passes.graph.infer import DOMAIN, constant, dtype_of, label, optional, present, set_type, shape_of
from onnxmesh.passes.normalise.indexing import pick

Rule = Callable[[ir.Node, Builder], bool]
"""Replaces the node through the builder and returns True, or leaves it (its attributes may change): False."""

RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register the decorated rule for `ops`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def known(node: ir.Node, index: int) -> np.ndarray | None:
    """The numbers that an optional input holds, flat; None where it is absent.

    Raises:
        ModelError: they depend on data.
    """
    return None if optional(node, index) is None else must_be_known(node, index)


def must_be_known(node: ir.Node, index: int) -> np.ndarray:
    """The numbers that an input holds, flat.

    Raises:
        ModelError: they depend on data, or the input is absent.
    """
    value = present(node, index)
    array = constant(value)
    if array is None:
        raise ModelError(
            f"input {index} of {label(node)}, '{value.name}', must be known when compiling, but depends on data",
            hint=value_hint(value),
            code="OM1208",
        )
    return array.reshape(-1)


def numbers(node: ir.Node, index: int) -> list[int] | None:
    """As `known`, integers."""
    array = known(node, index)
    return None if array is None else [int(n) for n in array]


def axes_of(node: ir.Node, axes: Sequence[int], rank: int) -> list[int]:
    """`axes` counted from the front, in order.

    Raises:
        ModelError: an axis is out of range.
    """
    for axis in axes:
        if not -rank <= axis < rank:
            raise ModelError(f"{label(node)} has axis {axis}, but its input has {rank} dims", code="OM1306")
    return sorted(axis % rank for axis in axes)


def _x(node: ir.Node) -> tuple[ir.Value, tuple[int, ...]]:
    x = present(node, 0)
    return x, shape_of(x)


# --- views --------------------------------------------------------------------------------------------------


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: ir.Node, b: Builder) -> bool:
    """What they do is in the output's shape."""
    b.replace(b.reshape(present(node, 0), *shape_of(node.outputs[0])))
    return True


@rule("Expand")
def expand(node: ir.Node, b: Builder) -> bool:
    """The output's shape says it."""
    b.replace(b.own("Expand", [present(node, 0)], shape_of(node.outputs[0])))
    return True


@rule("Tile")
def tile(node: ir.Node, b: Builder) -> bool:
    """An Expand where only dims of size 1 repeat."""
    x, shape = _x(node)
    repeats = numbers(node, 1) or []
    if all(n == 1 or size == 1 for n, size in zip(repeats, shape)):
        b.replace(b.own("Expand", [x], shape_of(node.outputs[0])))
    else:
        b.replace(b.own("Tile", [x], shape_of(node.outputs[0]), {"repeats": repeats}))
    return True


@rule("ConstantOfShape")
def constant_of_shape(node: ir.Node, b: Builder) -> bool:
    """A large one is a weight of one number, or a constant, expanded."""
    if fill_weight(b.graph, node):
        return True
    value = node.attributes.get_tensor("value", None)
    scalar = np.zeros((), np.float32) if value is None else value.numpy().reshape(())
    b.replace(b.own("Expand", [b.constant(scalar)], shape_of(node.outputs[0])))
    return True


@rule("Slice")
def slice_(node: ir.Node, b: Builder) -> bool:
    """Starts and steps as attributes, of the axes that are cut; the count is in the output's shape."""
    x, shape = _x(node)
    starts, ends = numbers(node, 1) or [], numbers(node, 2) or []
    axes = numbers(node, 3) or list(range(len(starts)))
    steps = numbers(node, 4) or [1] * len(starts)
    cut: dict[int, tuple[int, int]] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps):
        (axis,) = axes_of(node, [axis], len(shape))
        first, last, step = slice(start, end, step).indices(shape[axis])
        if (first, last, step) != (0, shape[axis], 1):
            cut[axis] = (max(first, 0), step)
    if not cut:
        b.replace(b.reshape(x, *shape))
        return True
    attributes = {
        "axes": sorted(cut),
        "starts": [cut[a][0] for a in sorted(cut)],
        "steps": [cut[a][1] for a in sorted(cut)],
    }
    b.replace(b.own("Slice", [x], shape_of(node.outputs[0]), attributes))
    return True


@rule("Split")
def split(node: ir.Node, b: Builder) -> bool:
    """The sizes are in the outputs' shapes."""
    x, shape = _x(node)
    (axis,) = axes_of(node, [node.attributes.get_int("axis", 0)], len(shape))
    made = b.node(DOMAIN, "Split", [x], {"axis": axis}, len(node.outputs))
    for new, old in zip(made.outputs, node.outputs):
        set_type(new, x.dtype, shape_of(old))
    b.replace(*made.outputs)
    return True


@rule("Pad")
def pad(node: ir.Node, b: Builder) -> bool:
    """Pads of every axis as an attribute."""
    x, shape = _x(node)
    rank = len(shape)
    given = numbers(node, 1) or []
    axes = [a % rank for a in numbers(node, 3) or range(rank)]
    pads = [0] * (2 * rank)
    for k, axis in enumerate(axes):
        pads[axis], pads[axis + rank] = given[k], given[k + len(axes)]
    attributes = {"pads": pads, "mode": node.attributes.get_string("mode", "constant")}
    b.replace(b.own("Pad", [x, optional(node, 2)], shape_of(node.outputs[0]), attributes))
    return True


@rule("Trilu")
def trilu(node: ir.Node, b: Builder) -> bool:
    """`k` as an attribute."""
    x, shape = _x(node)
    k = (numbers(node, 1) or [0])[0]
    b.replace(b.own("Trilu", [x], shape, {"k": k, "upper": node.attributes.get_int("upper", 1)}))
    return True


# --- along axes ---------------------------------------------------------------------------------------------

REDUCTIONS = ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
_ONE_ELEMENT = {"ReduceL1": "Abs", "ReduceL2": "Abs", "ReduceLogSum": "Log"}
"""What a reduction over no dim does to each element; the others keep it, but for ReduceSumSquare."""


@rule(*(f"Reduce{name}" for name in REDUCTIONS))
def reduce_(node: ir.Node, b: Builder) -> bool:
    """Axes as an attribute, never empty."""
    x, shape = _x(node)
    axes = numbers(node, 1)
    if axes is None:
        axes = list(node.attributes.get_ints("axes", ()))
    if not axes and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
        b.replace(b.reshape(x, *shape))
        return True
    axes = axes_of(node, axes, len(shape)) if axes else list(range(len(shape)))
    if not axes:
        b.replace(_reduced_scalar(node, b, x))
        return True
    if any(shape[axis] == 0 for axis in axes):
        b.replace(b.own("Expand", [_of_nothing(node, b, dtype_of(x))], shape_of(node.outputs[0])))
        return True
    keepdims = node.attributes.get_int("keepdims", 1)
    b.replace(b.own(node.op_type, [x], shape_of(node.outputs[0]), {"axes": axes, "keepdims": keepdims}))
    return True


_OF_NOTHING = {"ReduceProd": 1.0, "ReduceMean": np.nan, "ReduceLogSum": -np.inf, "ReduceLogSumExp": -np.inf}
"""What a reduction of no elements gives; the others give 0, but for the extremes."""


def _of_nothing(node: ir.Node, b: Builder, dtype: ir.DataType) -> ir.Value:
    """The greatest of no elements is the lowest number there is, and the least of none the highest."""
    number: float = _OF_NOTHING.get(node.op_type, 0.0)
    if node.op_type in ("ReduceMax", "ReduceMin"):
        lowest = node.op_type == "ReduceMax"
        if dtype == ir.DataType.BOOL:
            number = not lowest
        elif dtype.is_integer():
            limits = np.iinfo(dtype.numpy())
            number = limits.min if lowest else limits.max
        else:
            number = -np.inf if lowest else np.inf
    return b.constant(np.array(number), dtype)


def _reduced_scalar(node: ir.Node, b: Builder, x: ir.Value) -> ir.Value:
    if node.op_type == "ReduceSumSquare":
        return b.op("Mul", x, x)
    op = _ONE_ELEMENT.get(node.op_type)
    return b.op(op, x) if op else b.reshape(x)


@rule("CumSum", "CumProd")
def cumulative(node: ir.Node, b: Builder) -> bool:
    """The axis as an attribute."""
    x, shape = _x(node)
    (axis,) = axes_of(node, numbers(node, 1) or [0], len(shape))
    flags = {name: node.attributes.get_int(name, 0) for name in ("exclusive", "reverse")}
    b.replace(b.own(node.op_type, [x], shape, {"axis": axis, **flags}))
    return True


@rule("TopK")
def topk(node: ir.Node, b: Builder) -> bool:
    """`k` as an attribute."""
    x, shape = _x(node)
    (axis,) = axes_of(node, [node.attributes.get_int("axis", -1)], len(shape))
    flags = {name: node.attributes.get_int(name, 1) for name in ("largest", "sorted")}
    k = (numbers(node, 1) or [1])[0]
    made = b.node(DOMAIN, "TopK", [x], {"k": k, "axis": axis, **flags}, 2)
    for new, old in zip(made.outputs, node.outputs):
        set_type(new, old.dtype, shape_of(old))
    set_type(made.outputs[1], ir.DataType.INT64, shape_of(node.outputs[0]))
    b.replace(*made.outputs[: len(node.outputs)])
    return True


DEFAULT_AXIS = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LpNormalization"), -1),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), -1),
    **dict.fromkeys(("GatherElements", "ScatterElements", "ArgMax", "ArgMin", "Concat"), 0),
}


@rule(*DEFAULT_AXIS)
def explicit_axis(node: ir.Node, b: Builder) -> bool:
    """The axis stands in the attribute, counted from the front."""
    _, shape = _x(node)
    given = node.attributes.get_int("axis", DEFAULT_AXIS.get(node.op_type, 0))
    (axis,) = axes_of(node, [given], max(len(shape), 1))
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
    return False


@rule("Gather")
def gather(node: ir.Node, b: Builder) -> bool:
    """As above; rows that are known must be there, as where a sequence is longer than the table of positions."""
    explicit_axis(node, b)
    x, shape = _x(node)
    axis, rows = node.attributes.get_int("axis", 0), constant(present(node, 1))
    if rows is not None and rows.size and not -shape[axis] <= rows.min() <= rows.max() < shape[axis]:
        raise ModelError(
            f"{label(node)} reads row {int(rows.max())} of '{x.name}' {list(shape)}, which has {shape[axis]}",
            hint="is the sequence longer than the model allows?",
            code="OM1305",
        )
    return pick(node, b)


@rule("Transpose")
def transpose(node: ir.Node, b: Builder) -> bool:
    """The order stands in the attribute."""
    rank = len(shape_of(present(node, 0)))
    perm = node.attributes.get_ints("perm", ()) or tuple(reversed(range(rank)))
    node.attributes["perm"] = ir.AttrInt64s("perm", perm)
    return False


# --- arithmetic ---------------------------------------------------------------------------------------------


@rule("Gemm")
def gemm(node: ir.Node, b: Builder) -> bool:
    """MatMul, with Transpose, Mul and Add as its flags ask."""
    x, w, c = present(node, 0), present(node, 1), optional(node, 2)
    if node.attributes.get_int("transA", 0):
        x = b.transpose(x, 1, 0)
    if node.attributes.get_int("transB", 0):
        w = b.transpose(w, 1, 0)
    y = _scaled(b, b.op("MatMul", x, w), node.attributes.get_float("alpha", 1.0))
    beta = node.attributes.get_float("beta", 1.0)
    if c is not None and beta != 0.0:
        y = b.op("Add", y, _scaled(b, c, beta))
    b.replace(y)
    return True


def _scaled(b: Builder, x: ir.Value, by: float) -> ir.Value:
    return x if by == 1.0 else b.op("Mul", x, b.constant(by, dtype_of(x)))


@rule("Einsum")
def einsum(node: ir.Node, b: Builder) -> bool:
    """The equation says its output, which is else the letters that stand once, in order, after the ellipsis."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    if "->" not in equation:
        letters = equation.replace(".", "").replace(",", "")
        dots = "..." if "..." in equation else ""
        equation += "->" + dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    node.attributes["equation"] = ir.AttrString("equation", equation)
    return False


@rule("CastLike")
def cast_like(node: ir.Node, b: Builder) -> bool:
    """A Cast to the type of the output."""
    attributes: dict[str, Any] = {"to": int(dtype_of(node.outputs[0]))}
    attributes |= {name: a.value for name, a in node.attributes.items() if name in ("saturate", "round_mode")}
    b.replace(b.op("Cast", present(node, 0), **attributes))
    return True


@rule("SwiGLU")
def swiglu(node: ir.Node, b: Builder) -> bool:
    """`Swish(a) * b`."""
    gate = b.op("Swish", present(node, 0), alpha=node.attributes.get_float("alpha", 1.0))
    b.replace(b.op("Mul", gate, present(node, 1)))
    return True
