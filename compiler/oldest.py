"""What ONNX's converter leaves as it was in models of the oldest opsets, though its meaning has changed since."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import helper

BROADCASTING_OPSET = 7
"""From it on operands are broadcast as NumPy does it."""

RESHAPE_OPSET = 5
"""From it on Reshape takes its shape as an input."""

COORDINATES_OPSET = 11
"""From it on Resize says by attributes how positions are found in the image."""

_ALONG_AXIS = frozenset("Add Sub Mul Div Pow And Or Xor Equal Greater Less".split())
"""Ops whose attribute `axis` said where the dims of the second operand begin in the first one's."""


def mend(model: onnx.ModelProto, opset: int) -> None:
    """Make a model mean after its conversion what it means now, in place.

    Before opset 7 an operand may begin at any dim of the other one; PRelu's slopes begin at dim 1. Before opset 13
    Hardmax had one 1 for all dims from `axis` on.
    """
    if opset < BROADCASTING_OPSET:
        _broadcast(model)
    if opset >= RESHAPE_OPSET:
        nodes = [new for node in model.graph.node for new in (_flat(node) if node.op_type == "Hardmax" else [node])]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def mend_resizes(model: ir.Model, opset: int) -> None:
    """Let the Resizes of a model that was lifted from `opset` count as they did, in place.

    Pixels began at whole numbers; the nearest one was that before, and where the image shrinks that behind.
    """
    for node in model.graph.all_nodes():
        if opset < COORDINATES_OPSET and node.op_type == "Resize":
            scales = node.inputs[2] if len(node.inputs) > 2 else None
            known = None if scales is None or scales.const_value is None else scales.const_value.numpy()
            shrinks = known is not None and bool((known <= 1).all())
            modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "ceil" if shrinks else "floor"}
            node.attributes.update({name: ir.AttrString(name, mode) for name, mode in modes.items()})


def _flat(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A Hardmax over all dims from `axis` on, as a matrix's over its columns."""
    x, y = node.input[0], node.output[0]
    axis = next((int(a.i) for a in node.attribute if a.name == "axis"), 1)
    return [
        helper.make_node("Flatten", [x], [f"{y}~flat"], axis=axis),
        helper.make_node("Hardmax", [f"{y}~flat"], [f"{y}~matrix"], name=node.name, axis=1),
        helper.make_node("Shape", [x], [f"{y}~shape"]),
        helper.make_node("Reshape", [f"{y}~matrix", f"{y}~shape"], [y]),
    ]


def _broadcast(model: onnx.ModelProto) -> None:
    if not any(_first_dim(node) is not None for node in model.graph.node):
        return
    ranks = _ranks(model)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        first = _first_dim(node)
        if first is not None:
            x, y = node.input[:2]
            trailing = ranks.get(x, 0) - first % max(ranks.get(x, 0), 1) - ranks.get(y, 0)
            if trailing > 0 and ranks.get(y):
                model.graph.node.append(_widened(node, ranks[y], trailing))
        model.graph.node.append(node)


def _first_dim(node: onnx.NodeProto) -> int | None:
    """The dim of the first operand at which the second one's dims begin; None where they end at the last."""
    if node.op_type == "PRelu":
        return 1
    if node.op_type not in _ALONG_AXIS:
        return None
    return next((int(a.i) for a in node.attribute if a.name == "axis"), None)


def _widened(node: onnx.NodeProto, rank: int, trailing: int) -> onnx.NodeProto:
    """A node that gives the second operand dims of size 1 behind its own, for `node` to read."""
    source, wide = node.input[1], f"{node.input[1]}~{node.output[0]}"
    node.input[1] = wide
    kept = [a for a in node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend(kept)
    return helper.make_node("Unsqueeze", [source], [wide], axes=list(range(rank, rank + trailing)))


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    ranks = {name: len(kind.shape.dim) for name, kind in values.items() if kind.HasField("shape")}
    return {**ranks, **{tensor.name: len(tensor.dims) for tensor in graph.initializer}}
