"""Small helpers to read a graph in normal form around an anchor, and to put other nodes in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.reason import Reason
from onnxmesh.passes.graph.build import add_constant, fresh, is_folded, substitute
from onnxmesh.passes.graph.constants import SOURCES
from onnxmesh.passes.graph.provenance import origin

DOMAIN = "onnxmesh"
READABLE = 1 << 26
"""A constant of more elements is not looked into."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A pattern that was found at `node`, or nearly: then `reason` is a Reason that says what broke it."""

    pattern: str
    node: str
    found: bool
    reason: str = ""


class Miss(Exception):
    """The pattern at an anchor breaks here; `reason` is for the report."""

    def __init__(self, words: str, *, code: str) -> None:
        super().__init__(words)
        self.reason = Reason(words, code)


# --- reading ------------------------------------------------------------------------------------------------


def label(node: ir.Node) -> str:
    """The name of a node for a report."""
    return node.name or node.outputs[0].name or node.op_type


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of `ops` (or any, without ops)."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not ops or node.op_type in ops) else None


def describe(value: ir.Value | None) -> str:
    """Where a value comes from, in a few words."""
    node = producer(value)
    if node is not None:
        return f"{node.op_type} ({label(node)})"
    return "a constant" if value is not None and is_constant(value) else "a graph input"


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape of a value."""
    assert value is not None and value.shape is not None
    return value.shape.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initialiser that nobody can feed."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def array(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant, where they are not too many."""
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy() if value.const_value.size <= READABLE else None


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant with one element holds."""
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def scaled(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) where the node computes `x * c` for a constant c, of x's shape."""
    if node.op_type not in ("Mul", "Div", "Neg"):
        return None
    if node.op_type == "Neg":
        return given(node, 0), -1.0
    for x, factor in ((0, 1), (1, 0))[: 1 if node.op_type == "Div" else 2]:
        number = scalar(node.inputs[factor])
        if number and shape_of(node.inputs[x]) == shape_of(node.outputs[0]):
            return given(node, x), 1 / number if node.op_type == "Div" else number
    return None


def given(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there."""
    value = node.inputs[index]
    assert value is not None
    return value


def other(node: ir.Node, value: ir.Value) -> ir.Value:
    """The input of a binary node beside `value`; `value` itself where it is both."""
    return given(node, 1) if node.inputs[0] is value else given(node, 0)


def users(value: ir.Value, *ops: str) -> list[ir.Node]:
    """The nodes of the given ops (or all) that read `value`."""
    return [n for n in value.consumers() if not ops or n.op_type in ops]


def only_user(value: ir.Value, *ops: str) -> ir.Node | None:
    """The one node that reads `value`, if it is one of `ops` and `value` is no output of the graph."""
    nodes = value.consumers()
    if len(nodes) != 1 or value.is_graph_output():
        return None
    return nodes[0] if not ops or nodes[0].op_type in ops else None


def before_cast(value: ir.Value) -> ir.Value:
    """The floating point value that `value` is a cast of, or itself."""
    node = producer(value, "Cast")
    if node is None or not is_float(node.inputs[0]):
        return value
    return before_cast(given(node, 0))


def after_cast(value: ir.Value) -> ir.Value:
    """The value that the only user of `value` casts it to, or itself."""
    node = only_user(value, "Cast")
    return node.outputs[0] if node is not None and is_float(node.outputs[0]) else value


def is_float(value: ir.Value | None) -> bool:
    """Whether the value holds floating point numbers."""
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def ints(node: ir.Node, name: str) -> tuple[int, ...]:
    """An attribute that holds ints; none where it is absent."""
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else ()


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute that holds an int."""
    return node.attributes[name].as_int() if name in node.attributes else default


def last_axis(node: ir.Node, name: str = "axis", default: int = 0) -> bool:
    """Whether the axis attribute names the last dim of the node's output."""
    axis = integer(node, name, default)
    return axis in (-1, len(shape_of(node.outputs[0])) - 1)


def close(value: float, expected: float, dtype: ir.DataType | None) -> bool:
    """Whether a constant is the expected one, as exactly as its type can tell (1e-4, half precision 1e-2)."""
    half = dtype is not None and dtype.itemsize <= 2
    return abs(value - expected) <= abs(expected) * (1e-2 if half else 1e-4)


# --- writing ------------------------------------------------------------------------------------------------


class Editor:
    """Puts nodes into a graph. A node that is there already, with the same inputs, is used again.

    The order of the nodes is restored by one sort at the end.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._made: list[ir.Node] = []
        self._unclaimed: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        dtype: ir.DataType | None = None,
        attrs: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The output of an op: of the first input's element type, or of `dtype`."""
        first = next(v for v in inputs if v is not None)
        dtype = dtype or first.dtype
        assert dtype is not None
        return self.node(op_type, inputs, [(shape, dtype)], attrs, domain).outputs[0]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outs: Sequence[tuple[Sequence[int], ir.DataType]],
        attrs: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Node:
        """A node with outputs of the given shapes and element types."""
        first = next(v for v in inputs if v is not None)
        trimmed = list(inputs)
        while trimmed[-1] is None:
            trimmed.pop()
        for node in first.consumers():
            if node.op_type == op_type and _same(node, trimmed, [shape for shape, _ in outs], attrs or {}):
                return node
        base = first.name or op_type
        values = [
            ir.Value(name=fresh(self.graph, base), shape=ir.Shape(shape), type=ir.TensorType(dtype))
            for shape, dtype in outs
        ]
        node = ir.node(op_type, trimmed, attrs, domain=domain, outputs=values, name=fresh(self.graph, op_type))
        self.graph.append(node)
        self._made.append(node)
        self._unclaimed.append(node)
        return node

    def constant(self, data: np.ndarray, name: str) -> ir.Value:
        """An initialiser; equal data is stored once."""
        key = (str(data.dtype), data.shape, data.tobytes())
        value = self._constants.get(key)
        if value is None or value.graph is not self.graph:
            value = self._constants[key] = add_constant(self.graph, data, fresh(self.graph, name))
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in another element type."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", [value], shape_of(value), dtype, {"to": int(dtype)})

    def narrow(self, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
        """The weight in the smaller type `dtype` that `value` was cast from, where nothing is lost by it."""
        recipe, data = recipes.get(value), array(value)
        if data is None or not np.array_equal(data.astype(dtype.numpy()).astype(data.dtype), data):
            return None
        if is_folded(value):
            return self.constant(data.astype(dtype.numpy()), value.name or "weight")
        if recipe is None or recipe["op"] != "cast":
            return None
        name = fresh(self.graph, value.name or "weight")
        narrowed = recipes.cast(recipe["of"], dtype)
        made = recipes.initialiser(name, narrowed, dtype, shape_of(value), self.graph.meta[SOURCES])
        self.graph.initializers.add(made)
        return made

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """`value` in another shape."""
        if shape_of(value) == tuple(shape):
            return value
        return self.op("Reshape", [value], shape, domain=DOMAIN)

    def number(self, value: float, dtype: ir.DataType | None) -> ir.Value:
        """A constant of rank 0."""
        assert dtype is not None
        return self.constant(np.asarray(value, dtype.numpy()), "number")

    def times(self, value: ir.Value, factor: float) -> ir.Value:
        """`value` times a number."""
        return self.op("Mul", [value, self.number(factor, value.dtype)], shape_of(value))

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` stand for `old` everywhere, and remove what made `old` and has no other use.

        What was made for it comes from the node that made `old`, as far as reports are concerned.
        """
        node, anchor = new.producer(), old.producer()
        if anchor is not None:
            for made in self._unclaimed:
                made.meta.setdefault("origin", origin(anchor))
            self._unclaimed.clear()
        rename = node is not None and not any(v.is_graph_output() for v in node.outputs)
        substitute(self.graph, old, new, rename=rename)
        self.prune(old)

    def drop_unused(self) -> None:
        """Remove what was made and is not used, after a pattern broke half way."""
        for node in reversed(self._made):
            if node.graph is self.graph:
                self.prune(node.outputs[0])

    def prune(self, value: ir.Value | None) -> None:
        """Remove the nodes that make `value` as far as nothing uses them."""
        waiting = [value.producer() if value is not None else None]
        while waiting:
            node = waiting.pop()
            if node is None or node.graph is not self.graph or any(_used(v) for v in node.outputs):
                continue
            waiting += [v.producer() for v in node.inputs if v is not None]
            self.graph.remove(node, safe=True)


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _same(
    node: ir.Node, inputs: Sequence[ir.Value | None], shapes: Sequence[Sequence[int]], attrs: Mapping[str, Any]
) -> bool:
    if len(node.inputs) != len(inputs) or any(a is not b for a, b in zip(node.inputs, inputs)):
        return False
    if [shape_of(v) for v in node.outputs] != [tuple(shape) for shape in shapes]:
        return False
    return {k: _plain(a.value) for k, a in node.attributes.items()} == {k: _plain(v) for k, v in attrs.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def anchors(graph: ir.Graph, *ops: str) -> Iterator[ir.Node]:
    """The nodes of the given ops, as long as they stand in the graph."""
    for node in [n for n in graph if n.op_type in ops]:
        if node.graph is graph:
            yield node
