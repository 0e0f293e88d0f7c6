"""What both exports share: a torch model to an ONNX file in which the parameters have names and no values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from values import INSIDE, value

LARGEST_CONSTANT = 1 << 20
"""Bytes up to which a tensor that is no parameter may be inside the file."""


def export(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], output: str, path: Path) -> None:
    """Write `model` at the sizes of `inputs` as ONNX.

    Parameters keep their names of the state_dict. Their values are external data of a file that is not written: the
    graph compiles without weights, and runs with random ones or with those that a function gives. Only small ones are
    inside, as `values` makes them.

    Raises:
        ValueError: a tensor that is no parameter is larger than `LARGEST_CONSTANT`.
    """
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=23,
            optimize=False,
            output_names=[output],
            verbose=False,
        )
    assert program is not None
    proto = ir.to_proto(_optimised(program.model, set(model.state_dict())))
    path.parent.mkdir(parents=True, exist_ok=True)
    data = f"{path.name}.data"
    _without_values(proto, set(model.state_dict()), data)
    path.write_bytes(proto.SerializeToString())


def _optimised(model: ir.Model, parameters: set[str]) -> ir.Model:
    """What the exporter's own optimiser makes of it, while parameters are inputs: none is folded into another."""
    graph = model.graph
    held = {name: value.const_value for name, value in graph.initializers.items() if name in parameters}
    for name in held:
        graph.inputs.append(graph.initializers.pop(name))
        graph.inputs[-1].const_value = None
    optimizer.optimize_ir(model, num_iterations=2, onnx_shape_inference=False)
    while graph.inputs and graph.inputs[-1].name in held:
        value = graph.inputs.pop()
        value.const_value = held[value.name]
        if value.uses():
            graph.register_initializer(value)
    return model


def _without_values(proto: onnx.ModelProto, parameters: set[str], location: str) -> None:
    """Make the parameters external, and leave out how the exporter came to each node."""
    for item in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        item.ClearField("metadata_props")
    offset = 0
    for tensor in proto.graph.initializer:
        size = len(tensor.raw_data)
        if tensor.name not in parameters:
            if size > LARGEST_CONSTANT:
                raise ValueError(f"{tensor.name}: {size} bytes that are no parameter")
            continue
        if size <= INSIDE:
            tensor.raw_data = value(tensor.name, tuple(tensor.dims)).tobytes()
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, what in (("location", location), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(what))
        offset += size
