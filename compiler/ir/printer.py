"""Graphs as text that people read: one line a node, with the placements that it got."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxmesh.compiler.ir.loose import BODIES, loose_type
from onnxmesh.compiler.ir.view import dtype_of, plain_attrs
from onnxmesh.runtime.loose import dims
from onnxmesh.runtime.placement import Replicate


def graph_text(graph: ir.Graph) -> str:
    """All of a graph: inputs, initialisers, nodes, outputs."""
    lines = [f"graph {graph.name or ''}".rstrip()]
    lines += [f"  input  {value_text(value)}" for value in graph.inputs]
    lines += [f"  const  {value_text(value)}" for value in graph.initializers.values()]
    lines += [f"  {line}" for node in graph for line in _node_lines(node)]
    lines += [f"  output {value.meta.get('output_name', value.name)} = %{value.name}" for value in graph.outputs]
    return "\n".join(lines) + "\n"


def _node_lines(node: ir.Node) -> Iterator[str]:
    """A node, and the graphs that it holds below it."""
    yield node_text(node)
    for name, body in node.meta.get(BODIES, {}).items():
        yield f"  {name}:"
        yield from (f"  {line}" for line in graph_text(body).splitlines())


def node_text(node: ir.Node) -> str:
    """`%y: float32[2,8] tp:S(1) = MatMul(%x, %w)`."""
    outs = ", ".join(value_text(value) for value in node.outputs)
    ins = ", ".join("-" if value is None else f"%{value.name}" for value in node.inputs)
    attrs = "".join(f" {name}={_attr(value)}" for name, value in _attrs(node).items())
    return f"{outs} = {node.op_type}({ins}){attrs}"


def value_text(value: ir.Value) -> str:
    """Name, type, and the placements on the axes applied so far."""
    if (found := loose_type(value)) is not None:
        return f"%{value.name}: {found.text}{dims(found.shape)}"
    shape = "?" if value.shape is None else ",".join(str(dim) for dim in value.shape)
    dtype = "?" if value.dtype is None else dtype_of(value)
    spec = "".join(f" {axis}:{p}" for axis, p in value.meta.get("spec", ()) if not isinstance(p, Replicate))
    return f"%{value.name}: {dtype}[{shape}]{spec}"


def _attrs(node: ir.Node) -> dict[str, object]:
    simple = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR}
    if any(attr.type in simple for attr in node.attributes.values()):
        return dict.fromkeys(sorted(node.attributes), "...")
    return plain_attrs(node)


def _attr(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
