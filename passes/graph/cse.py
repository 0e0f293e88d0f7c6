"""Common subexpressions of a graph in normal form, where an op may say what it does in its output's shape."""

from __future__ import annotations

import json
from collections.abc import Hashable

import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.loose import BODIES, onnx_op
from onnxmesh.passes.graph.build import is_folded
from onnxmesh.passes.graph.fold import NOT_FOLDED
from onnxmesh.passes.graph.infer import attribute_key


def share_common(graph: ir.Graph) -> None:
    """Compute what is computed twice once; equal folded constants and equal recipes become one."""
    _share_constants(graph)
    seen: dict[Hashable, ir.Node] = {}
    for node in graph:
        if onnx_op(node) in NOT_FOLDED or BODIES in node.meta:
            continue
        first = seen.setdefault(_key(node), node)
        if first is not node and not any(v.is_graph_output() for v in node.outputs):
            for old, new in zip(node.outputs, first.outputs):
                old.replace_all_uses_with(new)
            graph.remove(node, safe=True)


def _share_constants(graph: ir.Graph) -> None:
    seen: dict[Hashable, ir.Value] = {}
    for value in list(graph.initializers.values()):
        recipe = recipes.get(value)
        if recipe is not None:
            key: Hashable = json.dumps(recipe)
        elif is_folded(value) and value.const_value is not None:
            key = (value.dtype, tuple(value.const_value.shape), value.const_value.tobytes())
        else:
            continue
        first = seen.setdefault(key, value)
        if first is not value and not value.is_graph_output():
            value.replace_all_uses_with(first)


def _key(node: ir.Node) -> Hashable:
    return (
        node.op_identifier(),
        tuple(id(v) if v is not None else None for v in node.inputs),
        tuple(sorted((a.name, attribute_key(a)) for a in node.attributes.values())),
        tuple((v.dtype, tuple(v.shape.dims) if v.shape is not None else None) for v in node.outputs),
    )
