"""Nodes that do nothing, and how each is seen to."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxmesh.passes.graph.build import remove
from onnxmesh.passes.graph.infer import DOMAIN, constant, present, shape_of


def drop_noop(graph: ir.Graph, node: ir.Node) -> bool:
    """Remove `node` if it gives back its input; says whether it did.

    An Identity stays where a graph output is a graph input, an initialiser or another output.
    """
    test = _NOOPS.get(node.op_type)
    if test is None or len(node.outputs) != 1:
        return False
    value = test(node)
    if value is None:
        return False
    output = node.outputs[0]
    is_needed = output.is_graph_output() and (value.producer() is None or value.is_graph_output())
    if is_needed and node.op_type == "Identity":
        return False
    remove(graph, node, value)
    return True


Test = Callable[[ir.Node], ir.Value | None]
"""The value that a node gives back as it is, or None."""


def _always(node: ir.Node) -> ir.Value | None:
    return present(node, 0)


def _same_shape(node: ir.Node) -> ir.Value | None:
    x = present(node, 0)
    return x if shape_of(x) == shape_of(node.outputs[0]) else None


def _same_type(node: ir.Node) -> ir.Value | None:
    x = present(node, 0)
    return x if x.dtype == node.outputs[0].dtype else None


def _in_order(node: ir.Node) -> ir.Value | None:
    """A Transpose that moves nothing, or that undoes the one before it."""
    x, perm = present(node, 0), node.attributes.get_ints("perm", ())
    if perm and list(perm) == sorted(perm):
        return x
    before = x.producer()
    if before is None or before.op_type != "Transpose":
        return None
    first = before.attributes.get_ints("perm", ())
    undone = bool(perm and first) and [first[p] for p in perm] == sorted(perm)
    return present(before, 0) if undone else None


def _one_piece(node: ir.Node) -> ir.Value | None:
    """Concat with pieces of size 0 left out."""
    axis = node.attributes.get_int("axis", 0)
    kept = [v for v in node.inputs if v is not None and shape_of(v)[axis] != 0]
    return kept[0] if len(kept) == 1 else None


def _rejoined(node: ir.Node) -> ir.Value | None:
    """Concat of pieces that together are what they were cut from, in order."""
    axis, start, source = node.attributes.get_int("axis", 0), 0, None
    for value in (v for v in node.inputs if v is not None):
        cut = _cut(value)
        if cut is None or cut[1:] != (axis, start) or source not in (None, cut[0]):
            return None
        source, start = cut[0], start + shape_of(value)[axis]
    return source if source is not None and shape_of(source)[axis] == start else None


def _cut(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """(source, axis, start) of a value that is a piece of another one."""
    node = value.producer()
    if node is None or node.domain != DOMAIN:
        return None
    if node.op_type == "Slice" and tuple(node.attributes.get_ints("steps", ())) == (1,):
        return present(node, 0), node.attributes.get_ints("axes")[0], node.attributes.get_ints("starts")[0]
    if node.op_type == "Split":
        axis = node.attributes.get_int("axis", 0)
        before = node.outputs[: node.outputs.index(value)]
        return present(node, 0), axis, sum(shape_of(other)[axis] for other in before)
    return None


def _joined(node: ir.Node) -> ir.Value | None:
    return _one_piece(node) or _rejoined(node)


def _no_pads(node: ir.Node) -> ir.Value | None:
    return present(node, 0) if not any(node.attributes.get_ints("pads", (1,))) else None


def _neutral(node: ir.Node) -> ir.Value | None:
    """The other input, where one input is a single number that changes nothing."""
    number = _NEUTRAL[node.op_type]
    for x, other in ((0, 1), (1, 0)) if node.op_type in _EITHER_SIDE else ((0, 1),):
        found = constant(present(node, other), 16)
        if found is not None and found.size == 1 and found.reshape(-1)[0] == number and _same_shape_as(node, x):
            return present(node, x)
    return None


def _same_shape_as(node: ir.Node, index: int) -> bool:
    x, output = present(node, index), node.outputs[0]
    return shape_of(x) == shape_of(output) and x.dtype == output.dtype


_NEUTRAL = {"And": True, "Or": False, "Mul": 1, "Add": 0, "Sub": 0, "Div": 1}
_EITHER_SIDE = frozenset({"And", "Or", "Mul", "Add"})

_NOOPS: dict[str, Test] = {
    "Identity": _always,
    "Reshape": _same_shape,
    "Expand": _same_shape,
    "Split": _always,
    "Cast": _same_type,
    "Transpose": _in_order,
    "Concat": _joined,
    "Pad": _no_pads,
    **dict.fromkeys(_NEUTRAL, _neutral),
}
