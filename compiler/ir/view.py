"""From an onnx_ir node to what a rule may know of it."""

from __future__ import annotations

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


def is_fixed(value: ir.Value | None, depth: int = FIXED_DEPTH) -> bool:
    """Whether the value is an initialiser, or made of initialisers alone by up to `depth` nodes, one after another."""
    if value is None or is_constant(value):
        return value is not None
    node = value.producer()
    if node is None or not depth or not node.inputs:
        return False
    return all(given is None or is_fixed(given, depth - 1) for given in reversed(node.inputs))


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


def view_of(node: ir.Node, ranks: int) -> OpView:
    """What a rule may know of `node` on a mesh axis of `ranks`."""
    ins = node.inputs
    return OpView(
        op=node.op_type,
        ins=tuple(None if value is None else shape_of(value) for value in ins),
        outs=tuple(shape_of(value) for value in node.outputs),
        in_dtypes=tuple("" if value is None else dtype_of(value) for value in ins),
        out_dtypes=tuple(dtype_of(value) for value in node.outputs),
        constant=tuple(is_constant(value) for value in ins),
        attrs=tuple(sorted(plain_attrs(node).items())),
        ranks=ranks,
        fixed=tuple(is_fixed(value) for value in ins),
    )
