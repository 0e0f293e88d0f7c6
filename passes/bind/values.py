"""Bind graph inputs by value: they become constants, and a run need not be given them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import add_constant, fresh

Arrays = Mapping[str, np.ndarray]


def typed_values(graph: ir.Graph, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values as arrays of their inputs' element types and shapes.

    An array must have the input's element type; numbers and lists take it.

    Raises:
        ModelError: there is no such input, or it is not a tensor of numbers, or the value does not fit it.
    """
    inputs = {value.name or "": value for value in graph.inputs}
    typed = {}
    for name, value in values.items():
        if name not in inputs:
            listed = ", ".join(f"'{n}'" for n in sorted(inputs)) or "none"
            raise ModelError(
                f"the model has no input '{name}' to bind to a value", hint=f"its inputs are {listed}", code="OM1201"
            )
        typed[name] = _typed(inputs[name], value)
    return typed


def bind_values(graph: ir.Graph, values: Arrays) -> None:
    """Put constants in the place of the inputs that `values` (as `typed_values` gives them) names, in place."""
    for value in list(graph.inputs):
        name = value.name or ""
        if name not in values:
            continue
        graph.inputs.remove(value)
        if value.is_graph_output():
            _own_output(graph, value)
        value.name = None
        value.replace_all_uses_with(add_constant(graph, values[name], name))


def _own_output(graph: ir.Graph, value: ir.Value) -> None:
    """A graph output of its own, which copies the input that was one."""
    copy = ir.node("Identity", [value], name=fresh(graph, "identity"))
    output = copy.outputs[0]
    output.name, output.type, output.shape = value.name, value.type, value.shape
    value.name = fresh(graph, "value")
    for index, old in enumerate(graph.outputs):
        if old is value:
            graph.outputs[index] = output
    graph.append(copy)


def _typed(port: ir.Value, value: Any) -> np.ndarray:
    name = f"input '{port.name}'"
    if not isinstance(port.type, ir.TensorType) or port.dtype in (None, ir.DataType.STRING):
        raise ModelError(
            f"{name} cannot be bound to a value: it is {port.type}", hint="only tensors of numbers can", code="OM1207"
        )
    assert port.dtype is not None
    dtype = port.dtype.numpy()
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype != dtype:
            raise ModelError(f"{name} is {dtype.name}, but its value is {array.dtype.name}", code="OM1207")
    else:
        array = _converted(name, value, dtype)
    dims = port.shape.dims if port.shape is not None else None
    if dims is not None and not _fits(array.shape, dims):
        expected = "[" + ", ".join(str(d) if isinstance(d, int) else (d.value or "?") for d in dims) + "]"
        raise ModelError(f"{name} has the shape {expected}, but its value has {list(array.shape)}", code="OM1207")
    return array


def _converted(name: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """Numbers or nested lists of them, in the input's element type, which must hold them."""
    try:
        given = np.array(value, dtype if value == [] else None)
        array = given.astype(dtype)
        whole = dtype.kind not in "iub" or bool(np.all(array == given))
    except (ValueError, TypeError, OverflowError):
        given, array, whole = np.array(0), np.array(0), False
    if not whole or given.dtype.kind not in "iufb":
        raise ModelError(f"{name} is {dtype.name}, which cannot hold the value {value!r}", code="OM1207")
    return array


def _fits(shape: tuple[int, ...], dims: tuple[int | ir.SymbolicDim, ...]) -> bool:
    return len(shape) == len(dims) and all(not isinstance(d, int) or d == n for n, d in zip(shape, dims))
