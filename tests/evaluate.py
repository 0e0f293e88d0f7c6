"""Run a graph in normal form on NumPy, node by node, with the runtime's kernels: what the compiler means by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.reference.ops
import onnx_ir as ir

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.passes.normalise.normalise import SOURCES
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.registry import Call, TensorType, find
from onnxmesh.runtime.recipe import evaluate as evaluate_recipe

Arrays = dict[str, np.ndarray]


def evaluate(model: ir.Model, inputs: Mapping[str, np.ndarray], *, keep: bool = False) -> Arrays:
    """The outputs of a normal-form model by name; with `keep`, every value that was computed."""
    graph = model.graph
    values = {v: np.asarray(inputs[v.name or ""]) for v in graph.inputs}
    values |= {v: number(graph, v) for v in graph.initializers.values()}
    for node in graph:
        results = run(node, [None if v is None else values[v] for v in node.inputs], model.opset_imports)
        for output, result in zip(node.outputs, results):
            check_type(node, output, result)
            values[output] = result
    return {v.name or "": array for v, array in values.items() if keep or v.is_graph_output()}


def number(graph: ir.Graph, value: ir.Value) -> np.ndarray:
    """The numbers of an initialiser, by its recipe where it has one."""
    recipe = recipes.get(value)
    if recipe is not None:
        return np.asarray(evaluate_recipe(recipe, lambda name: graph.meta[SOURCES][name].numpy()))
    assert value.const_value is not None
    return value.const_value.numpy()


def run(node: ir.Node, inputs: list[Any], opsets: Mapping[str, int]) -> tuple[Any, ...]:
    """The outputs of one node."""
    attrs = {a.name: _json(a) for a in node.attributes.values()}
    outs = tuple(TensorType(v.dtype.numpy(), tuple(v.shape)) if v.shape is not None else None for v in node.outputs)
    try:
        kernel = find(node.op_type)
    except PlanError:
        if node.domain:
            raise
        evaluator = onnx.reference.ops.load_op("", node.op_type, opsets[""]).eval
        result = evaluator(*inputs, n_outputs=len(node.outputs), **attrs)
    else:
        result = kernel(Call(np, attrs, outs, {}), *inputs)
    return result if isinstance(result, tuple) else (result,)


def check_type(node: ir.Node, output: ir.Value, result: Any) -> None:
    """Whether an output has the shape and the dtype that the graph says."""
    if output.shape is None:
        assert not output.uses(), output
        return
    assert tuple(result.shape) == tuple(output.shape), (node, output, result.shape)
    assert result.dtype == output.dtype.numpy(), (node, output, result.dtype)


def _json(attribute: ir.Attr) -> Any:
    value = attribute.value
    if isinstance(value, tuple):
        return list(value)
    return int(value) if isinstance(value, ir.DataType) else value
