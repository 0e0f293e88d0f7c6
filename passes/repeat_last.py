"""Repeat last: what is done to every element of an Expand is done before it, to fewer elements.

A rotary table holds every angle twice. `Cast(Reshape(Expand(Cos(x))))` becomes `Reshape(Expand(Cast(Cos(x))))`: the
Cast joins the Cos, and the Expand writes the table (docs/layout.md).
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from onnxmesh.compiler.ops.collectives import VIEWS
from onnxmesh.passes.build import on, substitute
from onnxmesh.passes.infer import shape_of
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE


def repeat_last(model: ir.Model) -> ir.Model:
    """Move elementwise ops of one input before the Expand that makes it, in place."""
    graph = model.graph
    for node in list(graph):
        if node.op_type in ELEMENTWISE and len(node.inputs) == 1 and not node.outputs[0].is_graph_output():
            _move(graph, node)
    return model


def _move(graph: ir.Graph, node: ir.Node) -> None:
    value, between = node.inputs[0], list[ir.Node]()
    assert value is not None
    while (producer := _repeats(value)) is not None:
        between.insert(0, producer)
        source = producer.inputs[0]
        assert source is not None
        value = source
    if prod(shape_of(value)) >= prod(shape_of(node.outputs[0])):
        return
    dtype = node.outputs[0].dtype
    made = [on(graph, node, value, dtype, shape_of(value))]
    for each in between:
        made.append(on(graph, each, made[-1].outputs[0], dtype, shape_of(each.outputs[0])))
    graph.insert_after(node, made)
    substitute(graph, node.outputs[0], made[-1].outputs[0])
    graph.remove([node, *reversed(between)], safe=True)


def _repeats(value: ir.Value) -> ir.Node | None:
    """The Expand or Reshape that makes a value for one reader."""
    producer = value.producer()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return producer if producer is not None and alone and producer.op_type in ("Expand", *VIEWS) else None
