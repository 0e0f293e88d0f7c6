"""Setting loose values apart, so that no later pass meets them (compiler/ir/loose.py).

A node that touches one, or whose op has no normal form, keeps the form that it has in the model: it is computed by the
kernel for loose values, or else by the reference fallback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir

import onnxmesh.runtime.kernels  # noqa: F401  (registers every kernel)
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.ir.loose import BODIES, HINT, LOOSE, REFERENCE, LooseType, note
from onnxmesh.passes.graph.deciding import unbound_values, value_hint
from onnxmesh.passes.graph.infer import DOMAIN, NORMAL_OPSET, label, static_shape
from onnxmesh.passes.normalise.normalise import ALL_RULES
from onnxmesh.runtime.kernels import registry
from onnxmesh.runtime.kernels.reference import node_attributes, require_reference
from onnxmesh.runtime.plan import KINDS


def is_static(value: ir.Value) -> bool:
    """Whether a value of a graph that is being bound is a tensor of numbers with a static shape."""
    numbers = isinstance(value.type, ir.TensorType) and value.dtype != ir.DataType.STRING
    return numbers and static_shape(value) is not None


def touches_loose(node: ir.Node) -> bool:
    """Whether an input or a named output of a node that is being bound is loose."""
    return any(not is_static(value) for value in _values(node))


def reads_loose(node: ir.Node) -> bool:
    """Whether an input of a node that is being bound is loose."""
    return any(value is not None and not is_static(value) for value in node.inputs)


def strings_as_nodes(graph: ir.Graph) -> None:
    """Make initialisers of strings Constant nodes: no weight holds strings."""
    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.STRING or value.const_value is None:
            continue
        node = ir.node("Constant", [], {"value": value.const_value}, name=name)
        del graph.initializers[name]
        value.name = None
        value.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        node.outputs[0].name = name
        graph.insert_before(graph[0], node) if len(graph) else graph.append(node)


def set_apart(graph: ir.Graph) -> None:
    """Give every node that touches a loose value, or has no normal form, an op of its own; make loose values tokens.

    Raises:
        ModelError: nothing computes an op.
    """
    normal = {*ALL_RULES, *registry.names(), *KINDS}
    apart = [n for n in graph if BODIES not in n.meta and (n.op_type not in normal or touches_loose(n))]
    for node in apart:
        if values := unbound_values(node):
            node.meta[HINT] = value_hint(*values)
    for node in apart:
        _set_node_apart(node, graph.opset_imports)
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        make_token(value)


def make_token(value: ir.Value) -> None:
    """Make a value a token if it is loose."""
    if value.type is not None and not is_static(value):
        shape = value.shape if isinstance(value.type, ir.TensorType) else None
        dims = () if shape is None else tuple(d if isinstance(d, int) else -1 for d in shape.dims)
        note(value, LooseType(value.type, dims))


def _values(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    yield from (value for value in node.outputs if value.name or value.uses())


def _set_node_apart(node: ir.Node, opsets: Mapping[str, int]) -> None:
    while node.outputs and not (node.outputs[-1].name or node.outputs[-1].uses()):
        node.resize_outputs(len(node.outputs) - 1)
    if not node.domain and registry.has_loose(node.op_type) and not _casts_strings(node):
        if node.op_type == "Constant":
            _hold_strings(node)
        node.op_type, node.domain = f"{LOOSE}{node.op_type}", DOMAIN
        return
    attributes = _reference(node, opsets)
    if attributes is None:
        return  # check_supported says so
    node.attributes.clear()
    for name, value in attributes.items():
        node.attributes[name] = ir.convenience.convert_attribute(name, value)
    node.op_type, node.domain = f"{REFERENCE}{node.op_type}", DOMAIN


def _casts_strings(node: ir.Node) -> bool:
    """Numbers are not written or read here."""
    return node.op_type in ("Cast", "CastLike") and any(v.dtype == ir.DataType.STRING for v in _values(node))


def _hold_strings(node: ir.Node) -> None:
    (attribute,) = node.attributes.values()
    if attribute.type == ir.AttributeType.TENSOR:
        array = attribute.as_tensor().numpy()
    else:
        array = np.array(attribute.value, dtype=object)
    strings = [item.decode() if isinstance(item, bytes) else str(item) for item in array.reshape(-1)]
    node.attributes.clear()
    node.attributes["strings"] = ir.Attr("strings", ir.AttributeType.STRINGS, strings)
    node.attributes["dims"] = ir.Attr("dims", ir.AttributeType.INTS, list(array.shape))


def _reference(node: ir.Node, opsets: Mapping[str, int]) -> dict[str, str | int] | None:
    """The attributes of the fallback for a node; None where onnx.reference does not know the op."""
    version = opsets.get(node.domain, onnx.defs.onnx_opset_version())
    if not node.domain and not onnx.defs.has(node.op_type, version, ""):
        version = max(version, NORMAL_OPSET)  # the compiler made it
    attributes = node_attributes(ir.serde.serialize_node(node), version)
    try:
        require_reference(attributes, ["" if value is None else _kind(value) for value in node.inputs])
    except NotImplementedError as error:
        if touches_loose(node):
            raise ModelError(
                f"{label(node)} cannot be computed: its shape depends on data, and there is no kernel for that",
                hint="shapes must be known when compiling; export the model with them fixed",
                code="OM1211",
            ) from error
        return None
    return attributes


def _kind(value: ir.Value) -> str:
    if not isinstance(value.type, ir.TensorType) or value.dtype is None:
        return "seq"
    return str(value.dtype.numpy().name)
