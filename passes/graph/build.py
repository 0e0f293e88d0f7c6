"""Putting nodes in the place of a node, with types inferred as they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.infer import DOMAIN, infer, label, set_type, shape_of

FOLDED = "folded"
"""`meta` key of an initialiser that the compiler made; the others stand in the model file."""


def fresh(graph: ir.Graph, base: str) -> str:
    """A name that no value or node of `graph` has; the same for the same model."""
    count = graph.meta.get("fresh", 0)
    graph.meta["fresh"] = count + 1
    return f"{base}~{count}"


def add_constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """A new initialiser that holds `array`."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    value.meta[FOLDED] = True
    graph.register_initializer(value)
    return value


def is_folded(value: ir.Value) -> bool:
    """Whether the compiler made this initialiser."""
    return bool(value.meta.get(FOLDED))


class Builder:
    """Makes the nodes that replace `anchor`: they stand right after it until `replace` removes it."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node) -> None:
        self.graph = graph
        self.anchor = anchor
        self.nodes: list[ir.Node] = []
        self._base = anchor.outputs[0].name or anchor.name or anchor.op_type

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """An ONNX op with one output."""
        return self.node("", op_type, inputs, attributes).outputs[0]

    def own(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int] | None = None,
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """An op of the normal form with one output, of the first input's element type unless `dtype` says another."""
        value = self.node(DOMAIN, op_type, inputs, attributes or {}).outputs[0]
        if shape is not None:
            if dtype is None:
                assert inputs[0] is not None
                dtype = inputs[0].dtype
            set_type(value, dtype, tuple(shape))
        return value

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`x` in an element type; itself where it has that."""
        return x if x.dtype == dtype else self.op("Cast", x, to=int(dtype))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """`x` with another shape."""
        return self.own("Reshape", [x], shape)

    def transpose(self, x: ir.Value, *perm: int) -> ir.Value:
        """`x` with its dims in the order `perm`."""
        return self.op("Transpose", x, perm=perm)

    def slice(self, x: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        """`x[start:stop]` along `axis`."""
        shape = list(shape_of(x))
        shape[axis] = stop - start
        return self.own("Slice", [x], shape, {"axes": [axis], "starts": [start], "steps": [1]})

    def constant(self, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant of NumPy's element type, or of `dtype`."""
        array = np.asarray(array) if dtype is None else np.asarray(array).astype(dtype.numpy())
        return add_constant(self.graph, array, fresh(self.graph, self._base))

    def node(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        outputs: int = 1,
    ) -> ir.Node:
        """A node of any op."""
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        values = [ir.Value(name=fresh(self.graph, self._base)) for _ in range(outputs)]
        kept = {k: v for k, v in attributes.items() if v is not None}
        name = fresh(self.graph, self.anchor.name or self._base)
        node = ir.node(op_type, trimmed, kept, domain=domain, outputs=values, name=name)
        infer(node, self.graph.opset_imports)
        self.nodes.append(node)
        return node

    def replace(self, *values: ir.Value | None) -> None:
        """Put the nodes into the graph and `values` in the place of the anchor's outputs; remove the anchor.

        None stands for an output that nobody uses.
        """
        if self.nodes:
            self.graph.insert_after(self.anchor, self.nodes)
            self.nodes[-1].name, self.anchor.name = self.anchor.name, self.nodes[-1].name
        made = {v for node in self.nodes for v in node.outputs}
        for old, new in zip(self.anchor.outputs, values):
            if new is None:
                self._require_unused(old)
            else:
                substitute(self.graph, old, new, rename=new in made)
        self.graph.remove(self.anchor, safe=True)

    def _require_unused(self, output: ir.Value) -> None:
        if output.uses() or output.is_graph_output():
            raise ModelError(
                f"the output '{output.name}' of {label(self.anchor)} is not supported",
                hint="export the model without it",
                code="OM1302",
            )


Expansion = Callable[[ir.Node, Builder], None]
"""Replaces a node through the builder, whose anchor it is."""


def on(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType | None, shape: Sequence[int]) -> ir.Node:
    """The same op as `node`, of one input and one output, on another value; it stands nowhere yet."""
    attributes = list(node.attributes.values())
    name = fresh(graph, node.name or node.op_type)
    copy = ir.Node(node.domain, node.op_type, [value], attributes, name=name)
    copy.meta.update({"origin": node.name, **node.meta})
    copy.outputs[0].name = fresh(graph, node.outputs[0].name or node.op_type)
    copy.outputs[0].meta.update({key: x for key, x in node.outputs[0].meta.items() if not key.startswith("global_")})
    set_type(copy.outputs[0], dtype, tuple(shape))
    return copy


def substitute(graph: ir.Graph, old: ir.Value, new: ir.Value, *, rename: bool = False) -> None:
    """Let `new` stand where `old` stood; a graph output keeps its name."""
    if old.is_graph_output():
        if new.producer() is None or new.is_graph_output():
            identity = ir.node("Identity", [new], name=fresh(graph, old.name or "identity"))
            set_type(identity.outputs[0], new.dtype, shape_of(new))
            anchor = old.producer()
            assert anchor is not None
            graph.insert_after(anchor, identity)
            new = identity.outputs[0]
        rename = True
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if rename and name is not None:
        old.name = None
        new.name = name


def remove(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Remove `node`, which has one output, and let `value` stand in its place."""
    substitute(graph, node.outputs[0], value)
    graph.remove(node, safe=True)
