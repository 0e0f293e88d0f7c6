"""A group of nodes as one node with an expression (runtime/kernels/fused.py)."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.view import is_constant, plain_attrs, shape_of
from onnxmesh.passes.fuse.groups import Group
from onnxmesh.passes.graph.build import is_folded
from onnxmesh.passes.graph.provenance import stands_for
from onnxmesh.runtime import recipe as evaluation
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE
from onnxmesh.runtime.placement import Partial

DOMAIN = "onnxmesh"


class Expression:
    """The expression of a group over its inputs, which are numbered as they are met."""

    def __init__(self, group: Group) -> None:
        self.inputs: dict[ir.Value, int] = {}
        self._group = group
        if group.core is not None and group.core.op_type == "MatMul":
            for value in group.core.inputs:
                self._operand(value)
        self.json = self._node(group.root)

    def _node(self, node: ir.Node) -> list[Any]:
        attrs = plain_attrs(node)
        literals = _literals(node) if node.op_type in ELEMENTWISE else {}
        operands = [literals.get(value) or self._operand(value) for value in node.inputs]
        return [node.op_type, *([attrs] if attrs else []), *operands]

    def _operand(self, value: ir.Value | None) -> Any:
        producer = value.producer() if value is not None else None
        if value is None:
            return None
        return self._node(producer) if producer in self._group.times else self._input(value)

    def _input(self, value: ir.Value) -> int:
        return self.inputs.setdefault(value, len(self.inputs))


def fuse_group(graph: ir.Graph, group: Group, op_type: str) -> ir.Node:
    """Put one node in the place of a group; the graph has to be sorted afterwards."""
    expression = Expression(group)
    old = [group.root.outputs[0], *([group.second] if group.second is not None else [])]
    new = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in old]
    text = json.dumps(expression.json, sort_keys=True, separators=(",", ":"))
    source = group.core or group.root
    inputs = list(expression.inputs)
    node = ir.node(op_type, inputs, {"expr": text}, domain=DOMAIN, outputs=new, name=source.name)
    node.meta.update(source.meta)
    stands_for(node, [source, *group.times])
    graph.insert_after(group.root, node)
    for before, after in zip(old, new):
        after.meta.update(before.meta)
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        before.name = None
    _remove(graph, group)
    return node


def _remove(graph: ir.Graph, group: Group) -> None:
    """Remove the nodes that no other group computes too; users come first, for that is how groups grow."""
    for node in group.times:
        if not any(value.uses() for value in node.outputs):
            graph.remove(node, safe=True)


def _literals(node: ir.Node) -> dict[ir.Value | None, list[Any]]:
    """The operands of an elementwise node that may be written as numbers: those that its shape does not come from."""
    found = {value: literal for value in node.inputs if (literal := _literal(value)) is not None}
    others = [shape_of(value) for value in node.inputs if value is not None and value not in found]
    if not others or np.broadcast_shapes(*others) != shape_of(node.outputs[0]):
        return {}
    return found


def _literal(value: ir.Value | None) -> list[Any] | None:
    """The number that a small constant holds, the same on every rank."""
    if value is None or not is_constant(value) or math.prod(shape_of(value)) != 1:
        return None
    if any(isinstance(placement, Partial) for _, placement in value.meta.get("spec", ())):
        return None  # one rank has the number, the others zero
    recipe = recipes.get(value)
    if recipe is not None and recipe["op"] == "constant":
        array = evaluation.evaluate(recipe, _no_source)
    elif recipe is None and is_folded(value) and value.const_value is not None:
        array = value.const_value.numpy()
    else:
        return None
    return [array.dtype.name, _number(array)] if array.dtype.kind != "c" and array.size == 1 else None


def _number(array: np.ndarray) -> bool | int | float | str:
    if array.dtype.kind in "biu":
        plain: bool | int = array.reshape(()).item()
        return plain
    number = float(array.reshape(()))
    return number if math.isfinite(number) else str(number)


def _no_source(name: str) -> np.ndarray:
    raise AssertionError(f"a constant does not read {name!r}")
