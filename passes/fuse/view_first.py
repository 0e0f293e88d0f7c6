"""View first: what is done to a value that only views read is done behind them, where it joins what follows.

`Mul(Slice(Cast(x)), f)` becomes `Mul(Cast(Slice(x)), f)`: one op, with the slice a view of x. The columns of an image's
position ids are cast as a whole before they are taken apart.
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from onnxmesh.compiler.ops.collectives import VIEWS
from onnxmesh.passes.fuse.fuse import beside_products, joins
from onnxmesh.passes.fuse.groups import Groups
from onnxmesh.passes.fuse.repeat_last import changed, copied
from onnxmesh.passes.graph.build import on
from onnxmesh.passes.graph.infer import shape_of
from onnxmesh.passes.graph.match import only_user
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE
from onnxmesh.runtime.kernels.fused import ROTARY

Path = list[ir.Node]
"""Views, one behind the other."""


def view_first(model: ir.Model) -> ir.Model:
    """Move elementwise ops of one value behind the views that read it, in place."""
    graph = model.graph
    groups = beside_products(graph)
    for node in reversed(list(graph)):
        if node.graph is graph and node.op_type in ELEMENTWISE and groups.is_free(node):
            _move(graph, groups, node)
    return model


def _move(graph: ir.Graph, groups: Groups, node: ir.Node) -> None:
    paths, chain = _paths(groups, node.outputs[0]), _chain(groups, node)
    if not paths or not chain:
        return
    source = changed(chain[0])
    assert source is not None
    for path in paths:
        value = source
        made = list[ir.Node]()
        for view in path:
            made.append(on(graph, view, value, source.dtype, shape_of(view.outputs[0])))
            value = made[-1].outputs[0]
        for each in chain:
            old = changed(each)
            assert old is not None
            made.append(copied(graph, each, old, value))
            value = made[-1].outputs[0]
        graph.insert_after(path[-1], made)
        value.meta.update(path[-1].outputs[0].meta)
        path[-1].outputs[0].replace_all_uses_with(value)
    graph.remove([*(view for path in paths for view in reversed(path)), *reversed(chain)], safe=True)


def _paths(groups: Groups, value: ir.Value) -> list[Path]:
    """The views through which elementwise ops read a value; none where something else reads it, or they repeat it."""
    paths = []
    for use in value.uses():
        path = list[ir.Node]()
        reader: ir.Node | None = use.node
        while reader is not None and reader.op_type in ("Slice", *VIEWS):
            path.append(reader)
            reader = only_user(reader.outputs[0])
        if not path or reader is None or reader.op_type == ROTARY or not groups.is_free(reader):
            return []
        paths.append(path)
    ends = sum(prod(shape_of(path[-1].outputs[0])) for path in paths)
    return [] if value.is_graph_output() or ends > prod(shape_of(value)) else paths


def _chain(groups: Groups, node: ir.Node) -> list[ir.Node]:
    """The elementwise ops up to `node` that are one op and can all move; none where they end what stays."""
    chain = [node]
    while (value := changed(chain[0])) is not None:
        producer = value.producer()
        if producer is None or not joins(groups, value):
            return chain
        if producer.op_type not in ELEMENTWISE:
            return []
        chain.insert(0, producer)
    return []
