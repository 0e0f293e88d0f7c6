"""From an onnx_ir node to what a rule may know of it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import CompilerDefect
from onnxmesh.compiler.ir.loose import onnx_op
from onnxmesh.compiler.ir.rule import OpView, Shape

FIXED_DEPTH = 12
"""How many nodes at most stand between a stored weight and the number that is computed with."""


def shape_of(value: ir.Value) -> Shape:
    """The static shape of a value.

    Raises:
        CompilerDefect: the shape is not static; `bind` should have refused it.
    """
    shape = value.shape
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        raise CompilerDefect(f"value {value.name!r} has no static shape: {shape}")
    return tuple(int(dim) for dim in shape)  # type: ignore[arg-type]


def dtype_of(value: ir.Value) -> str:
    """The dtype's NumPy or ml_dtypes name."""
    if value.dtype is None:
        raise CompilerDefect(f"value {value.name!r} has no dtype")
    return str(value.dtype.numpy().name)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a NumPy or ml_dtypes name."""
    return np.dtype(getattr(ml_dtypes, name, name))


def ir_dtype(name: str) -> ir.DataType:
    """onnx_ir's dtype of a NumPy or ml_dtypes name."""
    return ir.DataType.from_numpy(numpy_dtype(name))


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initialiser."""
    return value is not None and value.is_initializer()


def made_of_constants(graph: ir.Graph) -> set[ir.Value]:
    """The values that nodes make of initialisers alone, by up to FIXED_DEPTH nodes one after another."""
    depths: dict[ir.Value, int] = {}
    for node in graph:
        given = [0 if is_constant(value) else depths.get(value) for value in node.inputs if value is not None]
        known = [depth for depth in given if depth is not None]
        if node.inputs and len(known) == len(given) and max(known, default=0) < FIXED_DEPTH:
            depths.update(dict.fromkeys(node.outputs, max(known, default=0) + 1))
    return set(depths)


def plain_attrs(node: ir.Node) -> dict[str, Any]:
    """The node's attributes as Python values; dtypes (Cast's `to`) by NumPy name. Types, as Optional has one, are left
    out: values know theirs.

    Raises:
        CompilerDefect: a graph attribute, or a reference to a function's attribute.
    """
    types = (ir.AttributeType.TYPE_PROTO, ir.AttributeType.TYPE_PROTOS)
    return {name: _plain(node, attr) for name, attr in sorted(node.attributes.items()) if attr.type not in types}


def _plain(node: ir.Node, attr: ir.Attr) -> Any:
    if attr.type == ir.AttributeType.TENSOR:
        array = attr.as_tensor().numpy()
        return tuple(array.ravel().tolist())
    if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise CompilerDefect(f"node {node.name!r} ({node.op_type}) holds a graph")
    if attr.name == "to" and onnx_op(node) in ("Cast", "BitCast"):
        return str(ir.DataType(attr.as_int()).numpy().name)
    value = attr.value
    return tuple(value) if isinstance(value, (list, tuple)) else value


def views_of(graph: ir.Graph, ranks: int) -> dict[ir.Node, OpView]:
    """The views of a graph's nodes, which stand in topological order."""
    fixed = made_of_constants(graph)
    return {node: view_of(node, ranks, fixed) for node in graph}


def view_of(node: ir.Node, ranks: int, fixed: Set[ir.Value] = frozenset()) -> OpView:
    """What a rule may know of `node` on a mesh axis of `ranks`.

    Args:
        fixed: what is made of constants alone; without it constants count as fixed, and nothing else.
    """
    ins = node.inputs
    constant = tuple(is_constant(value) for value in ins)
    return OpView(
        op=node.op_type,
        ins=tuple(None if value is None else shape_of(value) for value in ins),
        outs=tuple(shape_of(value) for value in node.outputs),
        in_dtypes=tuple("" if value is None else dtype_of(value) for value in ins),
        out_dtypes=tuple(dtype_of(value) for value in node.outputs),
        constant=constant,
        attrs=tuple(sorted(plain_attrs(node).items())),
        ranks=ranks,
        fixed=tuple(is_known or value in fixed for is_known, value in zip(constant, ins)),
    )
