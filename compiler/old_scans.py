"""Scan of opset 8, which ran over every item of a batch: Scans of opset 9, one for each item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.version_converter
from onnx import helper, numpy_helper

SCAN_OPSET = 9
"""From it on Scan knows no batch."""

_HIDDEN = "onnxmesh.scan"
"""The domain of Scans that ONNX's converter is not to see: it would take the batch dim from the model's inputs."""


def lift_scans(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model at opset 9 if it has such a Scan; else the model itself.

    Raises:
        ValueError: how many items a batch has is unknown, or its sequences have lengths of their own.
    """
    if opset >= SCAN_OPSET or not any(node.op_type == "Scan" for node in model.graph.node):
        return model
    shapes = _shapes(model)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.extend(_one_for_each(node, shapes) if node.op_type == "Scan" else [node])
    model.opset_import.append(helper.make_opsetid(_HIDDEN, 1))
    lifted = onnx.version_converter.convert_version(model, SCAN_OPSET)
    for node in lifted.graph.node:
        if node.domain == _HIDDEN:
            node.domain = ""
    kept = [opset for opset in lifted.opset_import if opset.domain != _HIDDEN]
    del lifted.opset_import[:]
    lifted.opset_import.extend(kept)
    return lifted


def _one_for_each(node: onnx.NodeProto, shapes: dict[str, Sequence[int]]) -> list[onnx.NodeProto]:
    """The nodes that take the batch apart, a Scan for each of its items, and those that put the outputs together."""
    lengths, *inputs = node.input
    batch = next((shapes[name][0] for name in inputs if shapes.get(name)), 0)
    if lengths or not batch:
        what = "has sequences of several lengths" if lengths else "is over a batch of unknown size"
        raise ValueError(f"Scan '{node.name or node.output[0]}' of opset 8 {what}")
    made, outputs = [], []
    for item in range(batch):
        at = f"{node.output[0]}~{item}"
        index = numpy_helper.from_array(np.array(item, np.int64))
        made.append(helper.make_node("Constant", [], [at], value=index))
        taken, given = [f"{at}~{name}" for name in inputs], [f"{at}~{name}" for name in node.output]
        made += [helper.make_node("Gather", [name, at], [one], axis=0) for name, one in zip(inputs, taken)]
        scan = onnx.NodeProto(op_type="Scan", domain=_HIDDEN, name=f"{node.name}~{item}", input=taken, output=given)
        scan.attribute.extend(_renamed(attribute) for attribute in node.attribute)
        rows = [f"{name}~row" for name in given]
        made += [scan, *(helper.make_node("Unsqueeze", [one], [row], axes=[0]) for one, row in zip(given, rows))]
        outputs.append(rows)
    return [*made, *(helper.make_node("Concat", list(x), [y], axis=0) for x, y in zip(zip(*outputs), node.output))]


def _renamed(attribute: onnx.AttributeProto) -> onnx.AttributeProto:
    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    copy.name = {"directions": "scan_input_directions"}.get(attribute.name, attribute.name)
    return copy


def _shapes(model: onnx.ModelProto) -> dict[str, Sequence[int]]:
    """The shapes that inference finds; a dim that it cannot tell is 0."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
