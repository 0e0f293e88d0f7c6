"""Precision: a float32 model computes in half precision, but for what must stay float32 (docs/precision.md).

Inputs and outputs stay as the model declares them; weights are converted by recipe. Values are cast where a node in
half precision and one in float32 meet, each value once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.view import is_constant
from onnxmesh.compiler.options import HALVES
from onnxmesh.passes.graph.build import add_constant, fresh, is_folded
from onnxmesh.passes.graph.constants import recipe_of
from onnxmesh.passes.graph.infer import set_type, shape_of
from onnxmesh.passes.graph.match import label
from onnxmesh.passes.precision import rules
from onnxmesh.passes.precision.rules import ATTENTION, MASK, READABLE, WIDE, Kept, is_statistic, is_wide
from onnxmesh.runtime.dtypes import float_max, is_narrow

Tensors = Mapping[str, ir.TensorProtocol]


@dataclass(frozen=True)
class Stays:
    """A node of the model that stays float32, and why."""

    node: str
    op: str
    reason: str


def convert(graph: ir.Graph, precision: str, tensors: Tensors) -> tuple[Stays, ...] | None:
    """Convert a graph in normal form, in place.

    Args:
        precision: `bf16` or `fp16`.
        tensors: the model's own initialisers, which recipes read.

    Returns:
        The nodes that stay float32; None if the model computes in half precision already and is left alone.
    """
    if any(is_half(value) for node in graph for value in (*node.inputs, *node.outputs)):
        return None
    half = ir.DataType.from_numpy(np.dtype(getattr(ml_dtypes, HALVES[precision], HALVES[precision])))
    kept = rules.kept(graph, half)
    stays = tuple(Stays(label(node), node.op_type, why.text) for node, why in kept.items())
    _Conversion(graph, half, tensors, kept).run()
    return stays


def is_half(value: ir.Value | None) -> bool:
    """Whether a value is a float narrower than float32."""
    return value is not None and value.dtype is not None and is_narrow(value.dtype.numpy())


class _Conversion:
    def __init__(self, graph: ir.Graph, half: ir.DataType, tensors: Tensors, kept: Mapping[ir.Node, Kept]) -> None:
        self._graph, self._half, self._tensors, self._kept = graph, half, tensors, kept
        made = (value for node in graph if node not in kept for value in node.outputs)
        self._narrowed = {value: None for value in made if is_wide(value) and not is_statistic(value)}
        self._known: dict[tuple[ir.Value, bool, bool], ir.Value] = {}

    def run(self) -> None:
        """Cast what a node reads in the other type, then give the converted values their own."""
        reads = [(node, i, value) for node in self._graph for i, value in enumerate(node.inputs) if is_wide(value)]
        for node, index, value in reads:
            assert value is not None
            wanted = node not in self._kept and not self._is_mask(node, index)
            if wanted != (value in self._narrowed):
                node.replace_input_with(index, self._cast(value, wanted))
        for value in self._narrowed:
            self._retype(value)
        for index, value in enumerate(list(self._graph.outputs)):
            if value in self._narrowed:
                self._declare(index, value)
        self._graph.sort()
        for name, constant in list(self._graph.initializers.items()):
            if not constant.uses() and not constant.is_graph_output():
                del self._graph.initializers[name]

    def _cast(self, value: ir.Value, to_half: bool) -> ir.Value:
        """The value in the other type, made once."""
        source = value.producer()
        before = self._kept.get(source) if source is not None else None
        huge = to_half and before is not None and before.huge
        key = (value, to_half, huge)
        if key not in self._known:
            self._known[key] = self._converted(value, to_half, huge)
        return self._known[key]

    def _is_mask(self, node: ir.Node, index: int) -> bool:
        return node.op_type in ATTENTION and index == MASK

    def _converted(self, value: ir.Value, to_half: bool, huge: bool) -> ir.Value:
        unknown = value.const_value is None  # it differs from rank to rank
        if not is_constant(value) or value.is_graph_input() or (unknown and huge):
            return self._nodes(value, self._half if to_half else WIDE, huge)
        fits = unknown or self._fits(value) if huge or _nbytes(value) <= READABLE else True
        if is_folded(value) or (not fits and _nbytes(value) <= READABLE):
            return add_constant(self._graph, self._saturated(_numbers(value)), self._name(value))
        if not fits:
            return self._nodes(value, self._half, huge)
        recipe = recipes.cast(recipe_of(value), self._half)
        made = recipes.initialiser(self._name(value), recipe, self._half, shape_of(value), self._tensors)
        self._graph.initializers.add(made)
        return made

    def _nodes(self, value: ir.Value, target: ir.DataType, huge: bool) -> ir.Value:
        """A Cast. Of what may be huge: finite numbers stay finite, and infinity stays infinite."""
        if huge:
            lowest, highest = (
                add_constant(self._graph, np.array(sign * self._limit, np.float32), self._name(value))
                for sign in (-1, 1)
            )
            clipped = self._node(value, "Clip", [value, lowest, highest], WIDE)
            infinite = self._node(value, "IsInf", [value], ir.DataType.BOOL)
            value = self._node(value, "Where", [infinite, value, clipped], WIDE)
        return self._node(value, "Cast", [value], target, to=target.value)

    def _node(self, origin: ir.Value, op: str, inputs: list[ir.Value], dtype: ir.DataType, **attrs: int) -> ir.Value:
        """An elementwise node of one output, of the shape of `origin`."""
        made = ir.Value(name=self._name(origin))
        set_type(made, dtype, shape_of(origin))
        node = ir.node(op, inputs, attrs, outputs=[made], name=fresh(self._graph, f"{origin.name}/{op}"))
        self._graph.append(node)  # sorted in the end
        return made

    def _retype(self, value: ir.Value) -> None:
        """Let a node in half precision make its result so."""
        set_type(value, self._half, shape_of(value))
        node = value.producer()
        if node is not None and node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", self._half.value)

    def _declare(self, index: int, value: ir.Value) -> None:
        """Give an output of the graph the type that the model declares, under its name."""
        known = self._known.get((value, False, False))
        wide = known if known is not None and not known.is_graph_output() else self._nodes(value, WIDE, False)
        wide.name, value.name = value.name, self._name(value)
        self._graph.outputs[index] = wide

    def _name(self, value: ir.Value) -> str:
        return fresh(self._graph, value.name or "half")

    @property
    def _limit(self) -> float:
        return float_max(self._half.numpy())

    def _fits(self, value: ir.Value) -> bool:
        """Whether all finite numbers of a constant stay finite."""
        numbers = _numbers(value)
        return not bool((np.isfinite(numbers) & (np.abs(numbers) > self._limit)).any())

    def _saturated(self, numbers: np.ndarray) -> np.ndarray:
        clipped = np.clip(numbers, -self._limit, self._limit)
        return np.where(np.isinf(numbers), numbers, clipped).astype(self._half.numpy())


def _nbytes(value: ir.Value) -> int:
    return 4 * prod(shape_of(value))


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    numbers: np.ndarray = value.const_value.numpy()
    return numbers
