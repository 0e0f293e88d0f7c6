"""Gather first: an AllGather before a Transpose, where the pieces of the ranks then lie in one run each.

Keys `[b, h, s, d]` gathered along s arrive in pieces of every head, which have to be put in order. Gathered as
`[b, s, h, d]` they arrive where they belong, and attention reads them transposed (docs/layout.md).
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from onnxmesh.compiler.ir.view import plain_attrs
from onnxmesh.passes.graph.build import on
from onnxmesh.passes.graph.infer import shape_of


def gather_first(model: ir.Model) -> ir.Model:
    """Move AllGathers before Transposes, in place."""
    for node in list(model.graph):
        if node.op_type == "AllGather":
            _move(model.graph, node)
    return model


def _move(graph: ir.Graph, gather: ir.Node) -> None:
    value, out = gather.inputs[0], gather.outputs[0]
    transpose = value.producer() if value is not None else None
    if transpose is None or value is None or transpose.op_type != "Transpose" or out.is_graph_output():
        return
    source, dim = transpose.inputs[0], gather.attributes.get_int("dim", 0)
    assert source is not None
    perm = plain_attrs(transpose).get("perm") or tuple(reversed(range(len(shape_of(value)))))
    before = shape_of(source)[: perm[dim]]
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    if not alone or prod(before) > 1 or prod(shape_of(value)[:dim]) == 1:
        return
    gathered = list(shape_of(source))
    gathered[perm[dim]] = shape_of(out)[dim]
    first = on(graph, gather, source, source.dtype, gathered)
    first.attributes["dim"] = ir.AttrInt64("dim", perm[dim])
    second = on(graph, transpose, first.outputs[0], source.dtype, shape_of(out))
    graph.insert_after(gather, [first, second])
    second.outputs[0].meta.update(out.meta)
    out.replace_all_uses_with(second.outputs[0])
    graph.remove([gather, transpose], safe=True)
