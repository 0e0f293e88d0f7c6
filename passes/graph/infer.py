"""Types of a node's outputs: ONNX's own inference, one node at a time, remembered for repeated blocks.

Every value that the compiler looks at has a static shape, so one walk in topological order types a graph; no
symbols are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError

Shape = tuple[int | None, ...]
Type = tuple[int, Shape | None] | bytes
"""An ONNX element type and a shape; a dim that is unknown is None. What is no tensor is a TypeProto."""

Types = tuple[Type | None, ...]
Data = tuple[np.ndarray | None, ...]

NORMAL_OPSET = 23
"""The opset of the normal form."""

SIZES_LIMIT, SCALES_LIMIT = 4096, 64
"""Integers, and other numbers, up to so many bytes are shown to shape inference; it asks for no weights."""


def label(node: ir.Node) -> str:
    """How messages name a node: `node 'name' (Op)`, with its domain where it has one."""
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"node '{node.name or node.outputs[0].name}' ({op})"


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """The input at `index`, or None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def present(node: ir.Node, index: int) -> ir.Value:
    """The input at `index`.

    Raises:
        ModelError: it is absent.
    """
    value = optional(node, index)
    if value is None:
        raise ModelError(f"{label(node)} has no input {index}", code="OM1210")
    return value


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of `value` where every dim is known."""
    if value.shape is None or not all(isinstance(d, int) for d in value.shape.dims):
        return None
    return tuple(d for d in value.shape.dims if isinstance(d, int))


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The static shape of `value`.

    Raises:
        ModelError: a dim is unknown.
    """
    shape = static_shape(value)
    if shape is None:
        raise ModelError(f"the shape of '{value.name}' is not static: {value.shape}", code="OM1209")
    return shape


def dtype_of(value: ir.Value) -> ir.DataType:
    """The element type of `value`.

    Raises:
        ModelError: it is unknown.
    """
    if value.dtype is None:
        raise ModelError(f"the element type of '{value.name}' is unknown", code="OM1209")
    return value.dtype


def set_type(value: ir.Value, dtype: ir.DataType | int | None, shape: tuple[int, ...]) -> None:
    """Give `value` its element type and static shape."""
    if dtype is not None:
        value.type = ir.TensorType(ir.DataType(dtype))
    value.shape = ir.Shape(shape)


def constant(value: ir.Value | None, limit: int | None = None) -> np.ndarray | None:
    """The numbers of a constant, or None where `value` is computed, absent or larger than `limit` bytes."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    if limit is not None and value.const_value.nbytes > limit:
        return None
    return read(value.const_value, f"tensor '{value.name}'")


def read(tensor: ir.TensorProtocol, what: str) -> np.ndarray:
    """The numbers of a tensor.

    Raises:
        ModelError: its data does not fit its shape, or is not there.
    """
    try:
        return tensor.numpy()
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(
            f"{what} cannot be read: {_first_line(error)}", hint="is the file complete?", code="OM1006"
        ) from error


def infer(node: ir.Node, opsets: Mapping[str, int]) -> None:
    """Set element type and shape of every output of `node` that inference can tell.

    Raises:
        ModelError: the inputs do not fit the op.
    """
    own = _OWN.get((node.domain, node.op_type))
    if own is not None:
        types = own(node)
    else:
        types = _from_schema(node, opsets)
    for value, found in zip(node.outputs, types):
        if found is None:
            continue
        if isinstance(found, bytes):
            value.type = ir.serde.deserialize_type_proto_for_type(onnx.TypeProto.FromString(found))
            continue
        dtype, shape = found
        value.type = ir.TensorType(ir.DataType(dtype))
        if shape is not None and (None not in shape or static_shape(value) is None):
            value.shape = ir.Shape(shape)


# --- by the schema of the op --------------------------------------------------------------------------------


def _from_schema(node: ir.Node, opsets: Mapping[str, int]) -> Types:
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, opsets.get(node.domain, 1))
    if domain == "" and not onnx.defs.has(node.op_type, version, domain):
        version = max(version, NORMAL_OPSET)  # the compiler made it
    if not onnx.defs.has(node.op_type, version, domain):
        return (None,) * len(node.outputs)
    types = tuple(None if v is None else _type(v) for v in node.inputs)
    data = tuple(_sizes(v) for v in node.inputs)
    key = _key(node, version, types, data)
    if key not in _REMEMBERED:
        if len(_REMEMBERED) > REMEMBERED_LIMIT:
            _REMEMBERED.clear()
        try:
            _REMEMBERED[key] = _ask(node, domain, version, types, data)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            shapes = ", ".join(_describe(v) for v in node.inputs)
            reason = _first_line(error)
            raise ModelError(f"{label(node)} does not fit its inputs {shapes}: {reason}", code="OM1210") from error
    return _REMEMBERED[key]


REMEMBERED_LIMIT = 8192
_REMEMBERED: dict[Hashable, Types] = {}
"""Types by everything that they depend on: blocks of a model repeat."""


def _sizes(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.dtype in (None, ir.DataType.STRING) or not isinstance(value.type, ir.TensorType):
        return None
    return constant(value, SIZES_LIMIT if value.dtype.is_integer() else SCALES_LIMIT)


def _key(node: ir.Node, version: int, types: Types, data: Data) -> Hashable:
    return (
        node.op_identifier(),
        version,
        len(node.outputs),
        types,
        tuple(None if d is None else d.tobytes() for d in data),
        tuple(sorted((a.name, attribute_key(a)) for a in node.attributes.values())),
    )


def attribute_key(attribute: ir.Attr) -> str:
    """A text that is equal for equal attributes."""
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        content = value.numpy().tolist() if value.dtype == ir.DataType.STRING else value.tobytes().hex()
        return f"{value.dtype} {value.shape} {content}"
    if isinstance(value, (int, float, str, tuple, list)):
        return repr(value)
    return f"{attribute.type} {id(value)}"


def _ask(node: ir.Node, domain: str, version: int, types: Types, data: Data) -> Types:
    """Ask the op's shape function."""
    proto = ir.serde.serialize_node(node)
    names = [f"i{k}" if t is not None else "" for k, t in enumerate(types)]
    outputs = [f"o{k}" for k in range(len(node.outputs))]
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(outputs)
    protos = {n: _proto(t) for n, t in zip(names, types) if t is not None}
    tensors = {n: onnx.numpy_helper.from_array(d, n) for n, d in zip(names, data) if d is not None}
    schema = onnx.defs.get_schema(node.op_type, version, domain)
    opsets = [onnx.helper.make_opsetid(domain, version)]
    found = onnx.shape_inference.infer_node_outputs(schema, proto, protos, tensors, opset_imports=opsets)
    return tuple(_read(found.get(n)) for n in outputs)


def _proto(kind: Type) -> onnx.TypeProto:
    return onnx.TypeProto.FromString(kind) if isinstance(kind, bytes) else onnx.helper.make_tensor_type_proto(*kind)


def _read(proto: onnx.TypeProto | None) -> Type | None:
    if proto is not None and proto.WhichOneof("value") in ("sequence_type", "optional_type"):
        return bytes(proto.SerializeToString(deterministic=True))
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.elem_type:
        return None
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return tensor.elem_type, dims


def _type(value: ir.Value) -> Type:
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        proto = onnx.TypeProto()
        ir.serde.serialize_type_into(proto, value.type)
        return bytes(proto.SerializeToString(deterministic=True))
    if value.shape is None:
        return int(dtype_of(value)), None
    return int(dtype_of(value)), tuple(d if isinstance(d, int) else None for d in value.shape.dims)


def _describe(value: ir.Value | None) -> str:
    return "none" if value is None else f"'{value.name}' {value.dtype}{value.shape or '[?]'}"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


# --- ops of the normal form, and ops that ONNX has no shape function for ------------------------------------


def _attention(node: ir.Node) -> Types:
    q, v = present(node, 0), present(node, 2)
    return ((int(dtype_of(q)), (*shape_of(q)[:3], shape_of(v)[3])),)


def _like_first(node: ir.Node) -> Types:
    x = present(node, 0)
    return ((int(dtype_of(x)), shape_of(x)),)


def _max_unpool(node: ir.Node) -> Types:
    """As ONNX's function, which says nothing where `output_shape` is given."""
    x, given = present(node, 0), constant(optional(node, 2))
    if given is not None:
        return ((int(dtype_of(x)), tuple(map(int, given))),)
    taps = node.attributes.get_ints("kernel_shape")
    strides = node.attributes.get_ints("strides", ()) or (1,) * len(taps)
    pads = node.attributes.get_ints("pads", ()) or (0,) * 2 * len(taps)
    ends = [a + b for a, b in zip(pads, pads[len(taps) :])]
    sizes = [(n - 1) * s + t - end for n, s, t, end in zip(shape_of(x)[2:], strides, taps, ends)]
    return ((int(dtype_of(x)), (*shape_of(x)[:2], *sizes)),)


def _kept(node: ir.Node) -> Types:
    """The type was given where the node was made."""
    return (None,) * len(node.outputs)


DOMAIN = "onnxmesh"
_OWN: dict[tuple[str, str], Callable[[ir.Node], Types]] = {
    (DOMAIN, "Attention"): _attention,
    (DOMAIN, "Rotary"): _like_first,
    ("", "MeanVarianceNormalization"): _like_first,
    ("", "GroupNormalization"): _like_first,
    ("", "Swish"): _like_first,
    ("", "MaxUnpool"): _max_unpool,
    **{(DOMAIN, op): _kept for op in ("Reshape", "Expand", "Slice", "Split")},
}
