"""Nodes of constants: weights that pass through views and casts become recipes, never copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.recipe import Recipe
from onnxmesh.passes.graph.build import fresh, is_folded, substitute
from onnxmesh.passes.graph.fold import LIMIT
from onnxmesh.passes.graph.infer import constant, dtype_of, present, shape_of

SOURCES = "sources"
"""`graph.meta` key: the tensors of the model's initialisers that recipes read, by name."""

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Ops whose second input is a weight where it is constant."""

Step = Callable[[ir.Node, Sequence[Recipe]], list[Recipe] | None]
"""The recipes of a node's outputs, from those of its inputs; None where the node is not a recipe."""


def to_recipe(graph: ir.Graph, node: ir.Node, tensors: Mapping[str, ir.TensorProtocol]) -> bool:
    """Replace a view or cast of initialisers by recipes over `tensors`; says whether it did."""
    step = _STEPS.get(node.op_type)
    inputs = [v for v in node.inputs if v is not None]
    if step is None or not inputs or not all(v.is_initializer() and not v.is_graph_input() for v in inputs):
        return False
    if all(is_folded(v) for v in inputs) or not all(_fits(v) for v in inputs):
        return False
    found = step(node, [recipe_of(v) for v in inputs])
    if found is None:
        return False
    _become(graph, node, found, tensors)
    return True


def fill_weight(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a ConstantOfShape by a recipe where a contraction reads it as its weight; says whether it did."""
    (output,) = node.outputs
    if output.is_graph_output() or not all(use.node.op_type in _WEIGHTED and use.idx == 1 for use in output.uses()):
        return False
    value = node.attributes.get_tensor("value", None)
    number = np.zeros((), np.float32) if value is None else value.numpy().reshape(())
    _become(graph, node, [recipes.expand(recipes.constant(number), shape_of(output))], {})
    return True


def _become(graph: ir.Graph, node: ir.Node, found: Sequence[Recipe], tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Put initialisers with these recipes in the place of a node's outputs."""
    for output, recipe in zip(node.outputs, found):
        name = output.name or fresh(graph, "recipe")
        if output.is_graph_output():
            name = fresh(graph, name)
        else:
            output.name = None
        value = recipes.initialiser(name, recipe, dtype_of(output), shape_of(output), tensors)
        graph.initializers.add(value)
        substitute(graph, output, value)
    graph.remove(node, safe=True)


def _fits(value: ir.Value) -> bool:
    """Whether a recipe may hold it: a folded constant would stand in it in full."""
    return not is_folded(value) or (value.const_value is not None and value.const_value.nbytes <= LIMIT)


def recipe_of(value: ir.Value) -> Recipe:
    """What an initialiser is made of."""
    own = recipes.get(value)
    if own is not None:
        return own
    if is_folded(value) and value.const_value is not None:
        return recipes.constant(value.const_value.numpy())
    return recipes.source(value.name or "")


def _transpose(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    return [recipes.transpose(of[0], node.attributes.get_ints("perm", ()))]


def _reshape(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    return [recipes.reshape(of[0], shape_of(node.outputs[0]))]


def _slice(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    axes, starts = node.attributes.get_ints("axes", ()), node.attributes.get_ints("starts", ())
    if any(step != 1 for step in node.attributes.get_ints("steps", ())):
        return None
    result = of[0]
    for axis, start in zip(axes, starts):
        result = recipes.slice_(result, axis, start, start + shape_of(node.outputs[0])[axis])
    return [result]


def _split(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    axis, start, result = node.attributes.get_int("axis", 0), 0, []
    for output in node.outputs:
        stop = start + shape_of(output)[axis]
        result.append(recipes.slice_(of[0], axis, start, stop))
        start = stop
    return result


def _concat(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    return [recipes.concat(of, node.attributes.get_int("axis", 0))]


def _cast(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    if dtype_of(node.outputs[0]).bitwidth <= 8 and dtype_of(node.outputs[0]).is_floating_point():
        return None  # which numbers are too large for these is said by attributes
    return [recipes.cast(of[0], dtype_of(node.outputs[0]))]


def _pad(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    pads = node.attributes.get_ints("pads", ())
    value = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    zero = len(node.inputs) < 2 or (value is not None and not value.any())
    plain = node.attributes.get_string("mode", "constant") == "constant" and min(pads, default=0) >= 0
    return [recipes.pad(of[0], pads)] if zero and plain else None


def _mul(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    """A weight times one number, of either order."""
    for x, by, recipe in ((0, 1, of[0]), (1, 0, of[-1])):
        number = constant(present(node, by), 16)
        floating = dtype_of(node.outputs[0]).is_floating_point()
        if number is None or number.size != 1 or not floating:
            continue
        if shape_of(present(node, x)) == shape_of(node.outputs[0]):
            return [recipes.mul(recipe, float(number.reshape(())))]
    return None


def _gather(node: ir.Node, of: Sequence[Recipe]) -> list[Recipe] | None:
    """Rows that follow each other are a slice."""
    x, axis = present(node, 0), node.attributes.get_int("axis", 0)
    indices = constant(present(node, 1))
    if indices is None or not indices.size:
        return None
    flat = indices.reshape(-1) % shape_of(x)[axis]
    start, stop = int(flat[0]), int(flat[0]) + flat.size
    if stop > shape_of(x)[axis] or any(int(row) != start + k for k, row in enumerate(flat)):
        return None
    return [recipes.reshape(recipes.slice_(of[0], axis, start, stop), shape_of(node.outputs[0]))]


_STEPS: dict[str, Step] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Cast": _cast,
    "Pad": _pad,
    "Mul": _mul,
    "Gather": _gather,
}
