"""Read an ONNX model from wherever it is, and refuse what is broken before anything else looks at it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as common
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.old_scans import lift_scans
from onnxmesh.compiler.oldest import mend, mend_resizes
from onnxmesh.passes.normalise.collectives import MICROSOFT, TENSORRT

OLDEST_OPSET, NEWEST_OPSET, LIFTED_OPSET = 1, 28, 13
STANDARD = frozenset({"ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training"})
DOMAINS = frozenset({"", "ai.onnx", *STANDARD, MICROSOFT, TENSORRT, "onnxmesh"})
DEPRECATED = {"GroupNormalization": MICROSOFT}
"""Ops of ONNX that its checker refuses in some opsets, with a domain that it does not look into."""
MISPLACED = {"SimplifiedLayerNormalization": MICROSOFT, "DistCollective": TENSORRT}
"""Ops of other domains that stand in ONNX's own, or in any: ONNX Runtime and TensorRT write them so."""
SMALL = 1024
"""Tensors up to so many bytes go through ONNX's checker and converter; of larger ones only the type does."""

Source: TypeAlias = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model


def load(model: Source) -> ir.Model:
    """The model as an onnx_ir graph of its own: checked, functions inlined, opset 13 or later, weights unread.

    External data is mapped when somebody asks for it; here only its place and size are checked. A model that is
    given as a ModelProto or as bytes has no folder, so it cannot have external data.

    Raises:
        ModelError: there is no such file, or it is not an ONNX model, or not a valid one, or of an opset, an IR
            version or an operator domain that is not supported, or its external data is missing or out of place.
    """
    if isinstance(model, ir.Model):
        _check(_without_weights(model))
        result = model.clone()
    elif isinstance(model, onnx.ModelProto):
        result = _from_proto(model, "the model", None)
    elif isinstance(model, bytes):
        result = _from_proto(_parse(model, "the model"), "the model", None)
    else:
        path = Path(model)
        result = _from_proto(_parse(_read(path), f"'{path}'"), f"'{path}'", path.parent)
    check_external_data(result)
    return _prepared(result)


def original(model: Source) -> ir.Model:
    """The model as it was given, to be changed and written."""
    if isinstance(model, ir.Model):
        return model.clone()
    if isinstance(model, onnx.ModelProto):
        return ir.from_proto(model)
    return ir.from_proto(_parse(model, "the model")) if isinstance(model, bytes) else ir.load(model)


def _prepared(model: ir.Model) -> ir.Model:
    """Inline functions, check the domains and lift an old opset."""
    try:
        common.InlinePass()(model)
    except Exception as error:
        raise ModelError(f"the model's functions cannot be inlined: {_one_line(error)}", code="OM1011") from error
    for node in model.graph.all_nodes():
        if node.domain == "ai.onnx":
            node.domain = ""
        if node.op_type in MISPLACED:
            node.domain = MISPLACED[node.op_type]
    common.RemoveInitializersFromInputsPass()(model)
    check_nodes(model)
    return lift(model)


# --- bytes to a proto ---------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"there is no file '{path}'", code="OM1001") from None
    except IsADirectoryError:
        found = sorted(p.name for p in path.glob("*.onnx"))
        hint = f"it holds {', '.join(found)}" if found else "give the path of an .onnx file"
        raise ModelError(f"'{path}' is a folder", hint=hint, code="OM1002") from None
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}", code="OM1002") from None


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{name} is empty", hint="export the model again, or copy it again", code="OM1003")
    try:
        return onnx.ModelProto.FromString(data)
    except DecodeError:
        pass
    if len(data) > 2**31 - 1:
        raise ModelError(
            f"{name} is larger than 2 GiB, which protobuf cannot read",
            hint="save it with external data: onnx.save(..., save_as_external_data=True)",
            code="OM1004",
        )
    raise ModelError(
        f"{name} is not an ONNX model, or was cut short", hint="is the copy or the download complete?", code="OM1003"
    )


def _from_proto(proto: onnx.ModelProto, name: str, folder: Path | None) -> ir.Model:
    """Check a proto and wrap it, without copying its weights."""
    missing = [f for f in ("graph", "ir_version", "opset_import") if not _has(proto, f)]
    if missing or not (proto.graph.node or proto.graph.output):
        lacks = f"it has no {missing[0]}" if missing else "its graph is empty"
        raise ModelError(
            f"{name} is not an ONNX model, or was cut short: {lacks}", hint="is the copy complete?", code="OM1003"
        )
    if not proto.graph.output:
        raise ModelError(f"{name} has no outputs", hint="was it cut short?", code="OM1003")
    try:
        for tensor in _inline_tensors(proto.graph):
            _check_inline(tensor, name)
        _check(_light(proto))
        model = ir.serde.deserialize_model(proto)
    except ModelError:
        raise
    except Exception as error:  # names that are not text, types that do not exist, ...
        raise ModelError(f"{name} is not a valid ONNX model: {_one_line(error)}", code="OM1005") from error
    for external in _external(model):
        if folder is None:
            raise ModelError(
                f"tensor '{external.name}' lies in '{external.location}', but the model has no folder",
                hint="give the path of the .onnx file, or load the external data first",
                code="OM1009",
            )
        external.base_dir = str(folder)
    return model


def _has(proto: onnx.ModelProto, name: str) -> bool:
    return bool(proto.opset_import) if name == "opset_import" else proto.HasField(name)


def _inline_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t


def _check_inline(tensor: onnx.TensorProto, name: str) -> None:
    """Whether a tensor in the file is of a known type and holds as many bytes as its shape says."""
    dtype = ir.DataType(tensor.data_type)
    if not tensor.HasField("raw_data"):
        return
    size = 1
    for dim in tensor.dims:
        size *= dim
    expected = (size * dtype.bitwidth + 7) // 8
    if len(tensor.raw_data) != expected:
        raise ModelError(
            f"{name}: tensor '{tensor.name}' of shape {list(tensor.dims)} needs {expected} bytes, "
            f"but has {len(tensor.raw_data)}",
            hint="is the copy complete?",
            code="OM1006",
        )


# --- what ONNX's own checker says ---------------------------------------------------------------------------


def _check(proto: onnx.ModelProto) -> None:
    """Versions, then ONNX's checker, on a model without its weights."""
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"the model has IR version {proto.ir_version}; the installed onnx reads up to {onnx.IR_VERSION}",
            hint="upgrade onnx",
            code="OM1007",
        )
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), LIFTED_OPSET)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ModelError(
            f"the model has opset {opset}; supported are {OLDEST_OPSET} to {NEWEST_OPSET}",
            hint="convert it with onnx.version_converter, or export it again",
            code="OM1008",
        )
    if opset > onnx.defs.onnx_opset_version():
        return  # the installed checker does not know this opset
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"the model is not valid: {_one_line(error)}", hint="onnx.checker refuses it", code="OM1005"
        ) from error


def _light(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its larger weights, which become inputs."""
    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph, source = light.graph, proto.graph
    graph.name = source.name or "graph"
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.sparse_initializer.extend(source.sparse_initializer)
    _tolerate(light)
    inputs = {v.name for v in source.input}
    for tensor in source.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() <= SMALL:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """As `_light`, of an onnx_ir model, which stays as it is."""
    light = model.clone()
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or (tensor.nbytes <= SMALL and not isinstance(tensor, ir.ExternalTensor)):
            continue
        value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        del light.graph.initializers[name]
        if value not in light.graph.inputs:
            light.graph.inputs.append(value)
    proto = ir.serde.serialize_model(light)
    _tolerate(proto)
    return proto


def _tolerate(proto: onnx.ModelProto) -> None:
    """Hide from the checker what it refuses without need.

    Graph inputs and outputs may lack a shape; ONNX's domain has two names; ONNX Runtime and TensorRT keep ops of their
    own in it, or do not import their domains; GroupNormalization is deprecated from opset 18 to 20, yet written.
    """
    for named in [*proto.opset_import, *proto.graph.node]:
        if named.domain == "ai.onnx":
            named.domain = ""
    for value in [*proto.graph.input, *proto.graph.output]:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    for node in proto.graph.node:
        node.domain = node.domain or (MISPLACED | DEPRECATED).get(node.op_type, "")
    known = {opset.domain for opset in proto.opset_import}
    for domain in sorted({node.domain for node in proto.graph.node} & {MICROSOFT, TENSORRT} - known):
        proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))


def _one_line(error: BaseException) -> str:
    """The text of an error, with the causes behind it, in one line."""
    texts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).replace("==> Context:", "; in").split())
        if text and text not in texts:
            texts.append(text)
        seen = seen.__cause__
    return ": ".join(texts).replace(" ;", ";") or type(error).__name__


# --- external data ------------------------------------------------------------------------------------------


def check_external_data(model: ir.Model) -> None:
    """Check that every external tensor lies inside the model's folder and is there whole; nothing is read.

    Raises:
        ModelError: it does not.
    """
    sizes: dict[str, int] = {}
    for tensor in _external(model):
        location = os.fspath(tensor.location)
        where = f"tensor '{tensor.name}' lies in '{location}'"
        if not location:
            raise ModelError(f"tensor '{tensor.name}' is external, but names no file", code="OM1009")
        if location not in sizes:
            sizes[location] = _external_size(tensor, where)
        offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
        if length < tensor.nbytes or offset < 0:
            raise ModelError(
                f"{where} with {length} bytes at offset {offset}, but {tensor.dtype}{tensor.shape} needs "
                f"{tensor.nbytes}",
                code="OM1006",
            )
        if offset + length > sizes[location]:
            raise ModelError(
                f"{where} at bytes {offset} to {offset + length}, but the file has {sizes[location]}",
                hint="is the copy or the download complete?",
                code="OM1006",
            )


def _external_size(tensor: ir.ExternalTensor, where: str) -> int:
    """The size of a tensor's file, which must lie in the model's folder, links followed."""
    location = os.fspath(tensor.location)
    folder = Path(tensor.base_dir or ".").resolve()
    path = folder / location
    if os.path.isabs(location) or not path.resolve().is_relative_to(folder):
        raise ModelError(
            f"{where}, outside the model's folder '{folder}'",
            hint="put the file beside the model, not a link to it",
            code="OM1010",
        )
    try:
        status = path.stat()
    except OSError:
        raise ModelError(
            f"{where}, but '{path}' does not exist", hint="put the file beside the model", code="OM1009"
        ) from None
    if not path.is_file():
        raise ModelError(f"{where}, which is not a file", code="OM1009")
    return status.st_size


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every external tensor of the model: initialisers, also of subgraphs, and attributes."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for value in (v for g in graphs for v in g.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value
    nodes = [*model.graph.all_nodes(), *(n for f in model.functions.values() for n in f.all_nodes())]
    for attribute in (a for n in nodes for a in n.attributes.values()):
        if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
            yield attribute.value


# --- domains and opsets -------------------------------------------------------------------------------------


def check_nodes(model: ir.Model) -> None:
    """Refuse ops that nobody here can know, and attributes that nobody can read.

    Raises:
        ModelError: an op is of an unknown domain, or a string is not text.
    """
    for node in model.graph.all_nodes():
        if node.domain not in DOMAINS:
            raise ModelError(
                f"node '{node.name}' is {node.domain}::{node.op_type}; the domain '{node.domain}' is unknown",
                hint="supported are ONNX's domains, com.microsoft, and functions that the model itself defines",
                code="OM1012",
            )
        for attribute in node.attributes.values():
            if isinstance(attribute.value, bytes):
                raise ModelError(f"the attribute '{attribute.name}' of node '{node.name}' is not text", code="OM1013")


def lift(model: ir.Model) -> ir.Model:
    """A model of opset 13 or later; below that ONNX's converter lifts it, without seeing the weights.

    Raises:
        ModelError: the converter cannot.
    """
    opsets = model.graph.opset_imports
    opset = opsets.setdefault("", opsets.get("ai.onnx", LIFTED_OPSET))
    if opset >= LIFTED_OPSET:
        return model
    light = _without_weights(model)
    light.ir_version = max(light.ir_version, 4)  # before it, initialisers were inputs too
    try:
        mend(light, opset)
        lifted = ir.serde.deserialize_model(
            onnx.version_converter.convert_version(lift_scans(light, opset), LIFTED_OPSET)
        )
    except Exception as error:
        raise ModelError(
            f"the model's opset {opset} cannot be lifted to {LIFTED_OPSET}: {_one_line(error)}",
            hint=f"export it with opset {LIFTED_OPSET} or later",
            code="OM1008",
        ) from error
    wanted = [v.name for v in model.graph.inputs]
    for value in list(lifted.graph.inputs):
        original = model.graph.initializers.get(value.name or "")
        if original is not None and value.name not in wanted:
            lifted.graph.inputs.remove(value)
            value.const_value = original.const_value
            lifted.graph.register_initializer(value)
    mend_resizes(lifted, opset)
    return lifted
