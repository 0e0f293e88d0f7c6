"""What can be computed now: constants, shapes, and the branch that an If takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.reference.ops
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import add_constant, fresh, substitute
from onnxmesh.passes.graph.infer import constant, infer, label, read, shape_of, static_shape

LIMIT = 64 * 1024
"""No constant above so many bytes is made, nor read to make one."""

POSITIONS_LIMIT = 8 * 1024 * 1024
"""Except integers along one dim, as positions are: they grow with a dim of the model, not with a product."""

RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")

NOT_FOLDED = frozenset(
    {
        *RANDOM,
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    }
)
READS_A_PART = frozenset({"Slice", "Gather"})
"""Ops that read little of a large input; of these an integer table or a mask is read at any size."""

_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.UINT8})


def fold(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace `node` by constants where they can be computed and are small; says whether it did.

    Raises:
        ModelError: the inputs do not fit the op.
    """
    if node.domain or node.op_type in NOT_FOLDED:
        return False
    if node.op_type == "Identity" and node.outputs[0].is_graph_output():
        return False  # it names a constant as an output
    arrays = _own_value(node) if node.op_type in _OWN_VALUE else _evaluated(graph, node)
    if arrays is None:
        return False
    for output, array in zip(node.outputs, arrays):
        if output.name or output.uses():
            _become_constant(graph, output, array)
    graph.remove(node, safe=True)
    return True


def _become_constant(graph: ir.Graph, output: ir.Value, array: np.ndarray) -> None:
    """A new initialiser in the place of `output`, under its name unless that is a graph output's."""
    name = output.name or fresh(graph, "constant")
    if output.is_graph_output():
        name = fresh(graph, name)
    else:
        output.name = None
    substitute(graph, output, add_constant(graph, array, name))


# --- values -------------------------------------------------------------------------------------------------


def _constant_node(node: ir.Node) -> list[np.ndarray] | None:
    (attribute,) = node.attributes.values()
    dtypes: dict[str, Any] = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    if attribute.name in ("value_string", "value_strings") or (attribute.name == "value" and _is_text(attribute)):
        return None
    if attribute.name == "value":
        return [read(attribute.as_tensor(), f"the value of {label(node)}")]
    if attribute.name not in dtypes:
        raise ModelError(f"{label(node)} holds a {attribute.name}, which is not a tensor of numbers", code="OM1309")
    return [np.array(attribute.value, dtypes[attribute.name])]


def _is_text(attribute: ir.Attr) -> bool:
    return attribute.as_tensor().dtype == ir.DataType.STRING


def _shape_node(node: ir.Node) -> list[np.ndarray] | None:
    shape = static_shape(node.inputs[0]) if node.inputs[0] is not None else None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return None if shape is None else [np.array(shape[start:end], np.int64)]


def _size_node(node: ir.Node) -> list[np.ndarray] | None:
    shape = static_shape(node.inputs[0]) if node.inputs[0] is not None else None
    return None if shape is None else [np.array(int(np.prod(shape)), np.int64)]


_OWN_VALUE = {"Constant": _constant_node, "Shape": _shape_node, "Size": _size_node}


def _own_value(node: ir.Node) -> list[np.ndarray] | None:
    return _OWN_VALUE[node.op_type](node)


def _evaluated(graph: ir.Graph, node: ir.Node) -> list[np.ndarray] | None:
    """The outputs of a node of constants, or None where they are not small or cannot be computed."""
    if not all(v is None or _readable(node, v) for v in node.inputs):
        return None
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return None
    infer(node, graph.opset_imports)
    if not all(_small(v) for v in node.outputs if static_shape(v) is not None):
        return None
    return run_reference(node, [constant(v) for v in node.inputs], graph.opset_imports.get("", 1))


def _readable(node: ir.Node, value: ir.Value) -> bool:
    if value.const_value is None or value.producer() is not None:
        return False
    return _small(value) or (node.op_type in READS_A_PART and value.dtype in _INTEGERS)


def _small(value: ir.Value) -> bool:
    if value.dtype is None or value.dtype == ir.DataType.STRING:
        return False
    shape = shape_of(value)
    size = int(np.prod(shape)) * value.dtype.itemsize
    along_one_dim = sum(d != 1 for d in shape) <= 1 and value.dtype in _INTEGERS
    return size <= (POSITIONS_LIMIT if along_one_dim else LIMIT)


def run_reference(node: ir.Node, inputs: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray] | None:
    """Compute `node` of `inputs` as the ONNX reference does; None where the reference cannot."""
    attributes = {a.name: _plain(a) for a in node.attributes.values()}
    try:
        evaluate = onnx.reference.ops.load_op("", node.op_type, opset).eval
        with np.errstate(all="ignore"):
            result = evaluate(*inputs, n_outputs=len(node.outputs), **attributes)
    except Exception:  # whatever the reference cannot do is left to the kernels
        return None
    results = result if isinstance(result, (tuple, list)) else [result]
    if not all(isinstance(r, (np.ndarray, np.generic)) for r in results):
        return None
    return [_typed(np.asarray(r), v) for r, v in zip(results, node.outputs)]


def _typed(array: np.ndarray, value: ir.Value) -> np.ndarray:
    return array if value.dtype is None else array.astype(value.dtype.numpy(), copy=False)


def _plain(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        return ir.serde.serialize_tensor(attribute.as_tensor())
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


# --- branches -----------------------------------------------------------------------------------------------


def inline_if(graph: ir.Graph, node: ir.Node) -> bool:
    """Put the nodes of the branch that an If takes in its place; says whether it did."""
    condition = constant(node.inputs[0], LIMIT) if node.op_type == "If" and not node.domain else None
    if condition is None:
        return False
    branch = node.attributes["then_branch" if condition.reshape(-1)[0] else "else_branch"].as_graph()
    nodes, outputs = take_nodes(branch, graph)
    if nodes:
        graph.insert_after(node, nodes)
    for old, new in zip(node.outputs, outputs):
        substitute(graph, old, new)
    graph.remove(node, safe=True)
    for attribute in node.attributes.values():
        let_go(attribute.as_graph())
    return True


def let_go(branch: ir.Graph) -> None:
    """Let what is left of a node's graph no longer use values of the graph around it."""
    for node in branch.all_nodes():
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def take_nodes(body: ir.Graph, graph: ir.Graph) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes and outputs of a subgraph, which is left empty; they may stand in `graph`, with its initialisers."""
    outputs = list(body.outputs)
    body.outputs.clear()
    nodes = list(body)
    body.remove(nodes)
    for value in list(body.initializers.values()):
        _move_initializer(body, graph, value)
    for value in (v for n in nodes for v in n.outputs):
        if value.name:
            value.name = fresh(graph, value.name)
    return nodes, outputs


def _move_initializer(source: ir.Graph, target: ir.Graph, value: ir.Value) -> None:
    assert value.name is not None
    del source.initializers[value.name]
    if value.name in target.initializers:
        value.name = fresh(target, value.name)
    if value.const_value is not None:
        value.shape = ir.Shape(value.const_value.shape.numpy())
        value.type = ir.TensorType(value.const_value.dtype)
    target.initializers.add(value)
