"""Scalars that models write as vectors of one number, as ONNX's own definition of AffineGrid does."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.passes.graph.build import add_constant, fresh
from onnxmesh.passes.graph.infer import constant, static_shape

SCALARS = frozenset({"Range"})
"""Ops whose operands are scalars."""


def take_scalars(graph: ir.Graph, node: ir.Node) -> bool:
    """Make scalars of the constant operands of `node` that hold one number; the node itself stays, so False."""
    if node.domain or node.op_type not in SCALARS:
        return False
    for index, value in enumerate(node.inputs):
        array = constant(value) if value is not None and static_shape(value) == (1,) else None
        if array is not None:
            name = fresh(graph, node.name or node.op_type)
            node.replace_input_with(index, add_constant(graph, array.reshape(()), name))
    return False
