"""The functions of onnx.backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxmesh.backend.devices import is_present, parse
from onnxmesh.backend.rep import Rep
from onnxmesh.compiler import frontend
from onnxmesh.compiler.api import ModelLike
from onnxmesh.compiler.errors import ModelError
from onnxmesh.runtime.errors import InvalidArgument

Info = tuple[Any, Sequence[int]]
"""The dtype and the shape of an output."""


def supports_device(device: str) -> bool:
    """Whether `device` is `CPU`, `CPU:n` (n ranks), or `CUDA`, `CUDA:n` (GPU n), and this host has it."""
    try:
        return is_present(parse(device))
    except InvalidArgument:
        return False


def is_compatible(model: ModelLike, device: str = "CPU", **_: Any) -> bool:
    """Whether the model can be read for a device that is here. Shapes are known, and checked, only with inputs."""
    try:
        frontend.load(model)
    except ModelError:
        return False
    return supports_device(device)


def prepare(model: ModelLike, device: str = "CPU", **_: Any) -> Rep:
    """The model, ready to run on a device (see `supports_device`); it is compiled when it is given inputs.

    Several ranks share the work of a model by tensor parallelism; what cannot be shared every rank computes.

    Raises:
        InvalidArgument: there is no such device.
        ModelError: the model cannot be read, or is not valid.
    """
    return Rep(model, parse(device))


def run_model(
    model: ModelLike, inputs: Sequence[Any] | Mapping[str, Any], device: str = "CPU", **_: Any
) -> tuple[Any, ...]:
    """The outputs of a model for `inputs`, in order or by name. Raises what `prepare` and `Rep.run` do."""
    with prepare(model, device) as rep:
        return rep.run(inputs)


def run_node(
    node: onnx.NodeProto,
    inputs: Sequence[Any] | Mapping[str, Any],
    device: str = "CPU",
    outputs_info: Sequence[Info] | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """The outputs of one node.

    Args:
        inputs: in the order of the node's inputs, absent ones left out; or by name.
        outputs_info: dtype and shape of every output, where the op itself does not say.
        kwargs: `opset_version`: the version of the op's domain; the newest by default.

    Raises:
        ModelError: the node is not valid, or does not fit its inputs.
        InvalidArgument: there is no such device.
    """
    names = list(dict.fromkeys(name for name in node.input if name))
    feeds = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(names, inputs))
    return run_model(_model_of(node, feeds, outputs_info, kwargs.get("opset_version")), feeds, device)


def _model_of(
    node: onnx.NodeProto, feeds: Mapping[str, Any], info: Sequence[Info] | None, version: int | None
) -> onnx.ModelProto:
    """A model of one node."""
    opsets = {"": onnx.defs.onnx_opset_version(), **({node.domain: _newest(node)} if node.domain else {})}
    if version is not None:
        opsets[node.domain] = version
    names = [name for name in node.output if name]
    imports = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    inputs = [helper.make_value_info(name, _type_of(x)) for name, x in feeds.items()]
    if info is not None:
        kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype, _ in info]
        outputs = [helper.make_tensor_value_info(n, kind, list(i[1])) for n, kind, i in zip(names, kinds, info)]
    else:
        outputs = [helper.make_value_info(name, kind) for name, kind in _inferred(node, inputs, imports).items()]
    graph = helper.make_graph([node], "node", inputs, outputs)
    return helper.make_model(graph, opset_imports=imports)


def _newest(node: onnx.NodeProto) -> int:
    try:
        return int(onnx.defs.get_schema(node.op_type, domain=node.domain).since_version)
    except onnx.defs.SchemaError:
        return 1


def _type_of(value: Any) -> onnx.TypeProto:
    if isinstance(value, list):
        return helper.make_sequence_type_proto(_type_of(value[0] if value else np.zeros(0, np.float32)))
    array = np.asarray(value)
    text = array.dtype.kind in "OUS"
    kind = onnx.TensorProto.STRING if text else helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_type_proto(kind, array.shape)


def _inferred(
    node: onnx.NodeProto, inputs: Sequence[onnx.ValueInfoProto], imports: Sequence[onnx.OperatorSetIdProto]
) -> dict[str, onnx.TypeProto]:
    """The types of the node's outputs as ONNX infers them.

    Raises:
        ModelError: it cannot.
    """
    names = [name for name in node.output if name]
    graph = helper.make_graph([node], "node", inputs, [onnx.ValueInfoProto(name=name) for name in names])
    try:
        found = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports), strict_mode=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"the node {node.op_type} does not fit its inputs: {' '.join(str(error).split())}", code="OM1210"
        ) from error
    types = {value.name: value.type for value in found.graph.output}
    unknown = [name for name in names if not types[name].WhichOneof("value")]
    if unknown:
        raise ModelError(
            f"the type of '{unknown[0]}', made by {node.op_type}, is unknown", hint="give outputs_info", code="OM1209"
        )
    return types
