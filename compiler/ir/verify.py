"""Check that a graph is in normal form, after every pass from `normalise` on."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.compiler.errors import CompilerDefect


def verify(graph: ir.Graph, after: str) -> None:
    """Raise CompilerDefect, naming the pass and the node, unless the graph is in normal form.

    Order: every input of a node is a graph input, an initialiser, or made by an earlier node. Types: every value has
    a dtype and a static shape.
    """
    known: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    for value in known:
        _check_type(value, after, "the graph's constants and inputs")
    for node in graph:
        where = f"node {node.name!r} ({node.op_type})"
        for read in node.inputs:
            if read is not None and read not in known:
                raise CompilerDefect(f"after {after}: {where} reads {read.name!r} before it is made")
        for value in node.outputs:
            _check_type(value, after, where)
            known.add(value)
    for value in graph.outputs:
        if value not in known:
            raise CompilerDefect(f"after {after}: nothing makes the graph output {value.name!r}")


def _check_type(value: ir.Value, after: str, where: str) -> None:
    if value.dtype is None:
        raise CompilerDefect(f"after {after}: {value.name!r} of {where} has no dtype")
    if value.shape is None or not all(isinstance(dim, int) for dim in value.shape):
        raise CompilerDefect(f"after {after}: {value.name!r} of {where} has no static shape: {value.shape}")
