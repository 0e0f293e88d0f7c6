"""Parts: a slice of a Concat that is one of its parts is that part.

The embedding of a timestep is exported as `Concat(sin, cos)`, cut in the middle, and joined the other way round.
"""

from __future__ import annotations

from itertools import accumulate

import onnx_ir as ir

from onnxmesh.passes.graph.build import substitute
from onnxmesh.passes.graph.infer import shape_of


def parts(model: ir.Model) -> ir.Model:
    """Replace such slices, and remove Concats that nobody reads any more, in place."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Slice" and not node.outputs[0].is_graph_output():
            part = _part(node)
            if part is not None:
                substitute(graph, node.outputs[0], part)
                graph.remove(node, safe=True)
    for node in list(graph):
        value = node.outputs[0]
        if node.op_type == "Concat" and not value.uses() and not value.is_graph_output():
            graph.remove(node, safe=True)
    return model


def _part(node: ir.Node) -> ir.Value | None:
    """The part of a Concat that a Slice takes, if it takes just one."""
    value = node.inputs[0]
    concat = value.producer() if value is not None else None
    if value is None or concat is None or concat.op_type != "Concat":
        return None
    before, after = shape_of(value), shape_of(node.outputs[0])
    cut = [i for i, (whole, size) in enumerate(zip(before, after)) if whole != size]
    axis = concat.attributes.get_int("axis", 0) % len(before)
    axes, starts = (tuple(node.attributes[name].as_ints()) for name in ("axes", "starts"))
    if cut != [axis] or any(step != 1 for step in node.attributes["steps"].as_ints()):
        return None
    pieces = [piece for piece in concat.inputs if piece is not None]
    ends = accumulate((shape_of(piece)[axis] for piece in pieces), initial=0)
    at = starts[axes.index(axis)]
    fitting = (piece for start, piece in zip(ends, pieces) if start == at and shape_of(piece) == after)
    return next(fitting, None)
