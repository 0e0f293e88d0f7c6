"""The reference fallback: onnx's own implementation of one node, on the host.

For ops without a kernel here. It is right, and slow: the report names every node that uses it. A plan may come from
anywhere, so its node is taken only where nothing but its inputs and small attributes can matter: an op of ONNX's own
domains, without graphs, without tensors in other files.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxmesh.runtime.errors import PlanError, RunError
from onnxmesh.runtime.kernels.registry import Call, kernel

if TYPE_CHECKING:
    import onnx
    from onnx.reference import ReferenceEvaluator

REFERENCE = "Reference"

DOMAINS = ("", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training")
ATTRIBUTES = ("FLOAT", "FLOATS", "INT", "INTS", "STRING", "STRINGS", "TENSOR", "TYPE_PROTO")
"""Kinds of attributes that it takes."""

REFUSED = ("ImageDecoder",)
"""Ops that it hands to a library which picks what to do by the data: they have kernels here (image_decoder.py)."""


@kernel(REFERENCE)
@kernel(REFERENCE, backend="loose")
def reference(call: Call, *inputs: Any) -> tuple[Any, ...]:
    """The node in the attribute `node`, run by onnx.reference.

    Attributes: `op_type` and `domain`, `version` (the opset of its domain), `node` (a serialised NodeProto, base64).

    Raises:
        PlanError: as `check_node`.
        RunError: onnx is not installed.
    """
    values = [_on_host(value) for value in inputs]
    kinds = tuple("" if value is None else _kind(value) for value in values)
    run = _evaluator(*_own(call.attrs), kinds)
    names = _names("i", len(values))
    results = run.run(None, {name: value for name, value in zip(names, values) if value is not None})
    return tuple(_result(call, result, number) for number, result in enumerate(results))


def node_attributes(node: onnx.NodeProto, version: int) -> dict[str, str | int]:
    """The attributes of the kernel for a node of a model; its inputs and outputs are named by position."""
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [name and own for name, own in zip(node.input, _names("i", len(node.input)))]
    copy.output[:] = [name and own for name, own in zip(node.output, _names("o", len(node.output)))]
    copy.name = copy.doc_string = ""
    text = base64.b64encode(copy.SerializeToString(deterministic=True)).decode()
    return {"op_type": node.op_type, "domain": node.domain, "version": version, "node": text}


def check_node(attributes: Mapping[str, Any]) -> None:
    """Whether the kernel runs the node in its attributes.

    Raises:
        PlanError: they hold no node, not the one that they name, or one that could do more than compute.
        RunError: onnx is not installed.
    """
    _checked(*_own(attributes))


def require_reference(attributes: Mapping[str, Any], kinds: Sequence[str]) -> None:
    """Raise NotImplementedError unless onnx.reference has the op.

    Args:
        kinds: the dtype of every input by name, `seq` for what is no tensor, empty where it is absent.
    """
    try:
        _evaluator(*_own(attributes), tuple(kinds))
    except Exception as error:  # what it does not know it says in many ways
        raise NotImplementedError(str(error)) from error


Own = tuple[str, str, str, int]
"""The kernel's attributes: `node`, `op_type`, `domain`, `version`."""


def _own(attributes: Mapping[str, Any]) -> Own:
    node, op_type, domain, version = (attributes.get(name) for name in ("node", "op_type", "domain", "version"))
    if not all(isinstance(text, str) for text in (node, op_type, domain)) or type(version) is not int:
        raise _refused("its attributes are not a node, its op, domain and opset")
    return str(node), str(op_type), str(domain), version


@lru_cache(maxsize=256)
def _checked(text: str, op_type: str, domain: str, version: int) -> onnx.NodeProto:
    onnx = _onnx()
    try:
        node = onnx.NodeProto.FromString(base64.b64decode(text, validate=True))
    except Exception as error:  # protobuf's own errors share no base class
        raise _refused(f"its node cannot be read: {error}") from error
    if (node.op_type, node.domain) != (op_type, domain):
        raise _refused(f"it holds {node.domain}::{node.op_type}, but says {domain}::{op_type}")
    if domain not in DOMAINS or op_type in REFUSED:
        raise _refused(f"{domain}::{op_type} is none of the ops that it may run")
    for attribute in node.attribute:
        kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
        if kind not in ATTRIBUTES or attribute.ref_attr_name:
            raise _refused(f"its attribute '{attribute.name}' is of the kind {kind}")
        if attribute.t.external_data or attribute.t.data_location == onnx.TensorProto.EXTERNAL:
            raise _refused(f"its attribute '{attribute.name}' lies in another file")
    return node


def _refused(why: str) -> PlanError:
    return PlanError(f"the reference fallback refuses a node: {why}", hint="compile the model again", code="OM4005")


def _onnx() -> ModuleType:
    try:
        import onnx
    except ImportError as error:
        raise RunError(
            "the reference fallback needs the package onnx", hint="pip install onnx", code="OM5301"
        ) from error
    return onnx


@lru_cache(maxsize=256)
def _evaluator(text: str, op_type: str, domain: str, version: int, kinds: tuple[str, ...]) -> ReferenceEvaluator:
    onnx, node = _onnx(), _checked(text, op_type, domain, version)
    from onnx.reference import ReferenceEvaluator

    inputs = [onnx.helper.make_value_info(name, _proto(kind)) for name, kind in zip(_names("i", len(kinds)), kinds)]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "node", [i for i, kind in zip(inputs, kinds) if kind], outputs)
    opsets = {domain: version, "": version if domain == "" else onnx.defs.onnx_opset_version()}
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(*item) for item in opsets.items()])
    return ReferenceEvaluator(model)


def _proto(kind: str) -> onnx.TypeProto:
    """An input's type for the reference's own functions, which ask for element types alone."""
    import onnx

    if kind in ("", "seq"):
        element = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
        return onnx.helper.make_sequence_type_proto(element)
    if kind == "object":
        return onnx.helper.make_tensor_type_proto(onnx.TensorProto.STRING, None)
    import ml_dtypes

    element_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(getattr(ml_dtypes, kind, kind)))
    return onnx.helper.make_tensor_type_proto(element_type, None)


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def _kind(value: Any) -> str:
    return "seq" if isinstance(value, list) else str(value.dtype.name)


def _on_host(value: Any) -> Any:
    """A value in NumPy's arrays."""
    if isinstance(value, list):
        return [_on_host(item) for item in value]
    return value if value is None or isinstance(value, np.ndarray) else value.get()


def _result(call: Call, value: Any, number: int) -> Any:
    """A result in the namespace's arrays, of the dtype that the plan says."""
    if value is None or isinstance(value, list):
        return value if value is None else [_result(call, item, number) for item in value]
    expected = call.outs[number].dtype if number < len(call.outs) else None
    array = np.asarray(value)
    if expected is not None and expected.kind == "O":
        return array.astype(object)
    return call.xp.asarray(array if expected is None else array.astype(expected, copy=False))
