"""Repeat last: what is done to every element of an Expand is done before it, to fewer elements.

A rotary table holds every angle twice. `Cast(Reshape(Expand(Cos(x))))` becomes `Reshape(Expand(Cast(Cos(x))))`: the
Cast joins the Cos, and the Expand writes the table (docs/layout.md). Where nothing is repeated, as in
`Cast(Reshape(Cos(x)))`, an op moves as well if what makes the value is an elementwise op or a norm that it joins there.
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from onnxmesh.compiler.ops.collectives import VIEWS
from onnxmesh.passes.fuse.fuse import beside_products, joins
from onnxmesh.passes.fuse.groups import Groups
from onnxmesh.passes.graph.build import on, substitute
from onnxmesh.passes.graph.infer import shape_of
from onnxmesh.passes.graph.match import only_user
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE


def repeat_last(model: ir.Model) -> ir.Model:
    """Move elementwise ops of one value before the Expand, or the view, that makes it, in place."""
    graph = model.graph
    groups = beside_products(graph)
    for node in list(graph):
        if node.op_type in ELEMENTWISE and not node.outputs[0].is_graph_output():
            _move(graph, groups, node)
    return model


def _move(graph: ir.Graph, groups: Groups, node: ir.Node) -> None:
    start, between = changed(node), list[ir.Node]()
    value = start
    while value is not None and (producer := _repeats(value)) is not None:
        between.insert(0, producer)
        value = producer.inputs[0]
    if start is None or value is None or not between or not _pays(groups, node, value):
        return
    made = [copied(graph, node, start, value)]
    for each in between:
        made.append(on(graph, each, made[-1].outputs[0], node.outputs[0].dtype, shape_of(each.outputs[0])))
    graph.insert_after(node, made)
    made[-1].outputs[0].meta.update(node.outputs[0].meta)
    substitute(graph, node.outputs[0], made[-1].outputs[0])
    graph.remove([node, *reversed(between)], safe=True)


def changed(node: ir.Node) -> ir.Value | None:
    """The value whose elements an elementwise op changes one by one, all alike: other operands are single numbers."""
    values = [value for value in node.inputs if value is not None and not _is_number(value)]
    if len(values) != 1 or shape_of(values[0]) != shape_of(node.outputs[0]):
        return None
    return values[0] if list(node.inputs).count(values[0]) == 1 else None


def copied(graph: ir.Graph, node: ir.Node, old: ir.Value, new: ir.Value) -> ir.Node:
    """The same op as `node` on `new` where it reads `old`; it stands nowhere yet."""
    copy = on(graph, node, new, node.outputs[0].dtype, shape_of(new))
    copy.resize_inputs(len(node.inputs))
    for i, value in enumerate(node.inputs):
        copy.replace_input_with(i, new if value is old else value)
    return copy


def _is_number(value: ir.Value) -> bool:
    return value.is_initializer() and shape_of(value) in ((), (1,))


def _pays(groups: Groups, node: ir.Node, value: ir.Value) -> bool:
    """Whether an op has less to do on `value`, or joins what makes it and would join nothing where it stands."""
    if not shape_of(value):
        return False
    size, whole = prod(shape_of(value)), prod(shape_of(node.outputs[0]))
    if size != whole:
        return size < whole
    reader = only_user(node.outputs[0])
    return joins(groups, value) and not groups.is_free(reader)


def _repeats(value: ir.Value) -> ir.Node | None:
    """The Expand or Reshape that makes a value for one reader."""
    producer = value.producer()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return producer if producer is not None and alone and producer.op_type in ("Expand", *VIEWS) else None
