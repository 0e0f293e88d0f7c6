"""GatherND whose indices count through the data in order moves nothing: it is a Reshape.

Exporters write the padding mask of a transformer that way: indices made of ranges, as long as the sequence.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.fold import run_reference
from onnxmesh.passes.graph.infer import constant, dtype_of, present, shape_of

LIMIT = 64 * 1024 * 1024
"""Indices of so many bytes are computed to be looked at, and forgotten."""


def gather_in_order(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a GatherND that takes everything in order by a Reshape; says whether it did."""
    if node.op_type != "GatherND" or node.domain or node.attributes.get_int("batch_dims", 0) != 0:
        return False
    data, indices = present(node, 0), present(node, 1)
    depth = shape_of(indices)[-1]
    grid, rows = shape_of(data)[:depth], shape_of(indices)[:-1]
    if np.prod(grid) != np.prod(rows):
        return False
    found = _numbers(indices, graph.opset_imports.get("", 1), {})
    if found is None or not np.array_equal(found.reshape(-1, depth), _counted(grid)):
        return False
    builder = Builder(graph, node)
    builder.replace(builder.reshape(data, *rows, *shape_of(data)[depth:]))
    return True


def _counted(grid: tuple[int, ...]) -> np.ndarray:
    """Every index of a grid, the last dim fastest, one in each row."""
    return np.indices(grid).reshape(len(grid), -1).T


def _numbers(value: ir.Value, opset: int, seen: dict[ir.Value, np.ndarray | None]) -> np.ndarray | None:
    """The integers that `value` always holds, computed from constants; None where it depends on an input."""
    if value not in seen:
        seen[value] = _computed(value, opset, seen)
    return seen[value]


def _computed(value: ir.Value, opset: int, seen: dict[ir.Value, np.ndarray | None]) -> np.ndarray | None:
    size = int(np.prod(shape_of(value))) * dtype_of(value).itemsize
    if size > LIMIT or not dtype_of(value).is_integer():
        return None
    node = value.producer()
    if node is None:
        return constant(value)
    if node.domain or len(node.outputs) != 1 or value.is_graph_input():
        return None
    inputs = [None if v is None else _numbers(v, opset, seen) for v in node.inputs]
    if any(array is None and v is not None for array, v in zip(inputs, node.inputs)):
        return None
    results = run_reference(node, inputs, opset)
    return None if results is None else results[0]
