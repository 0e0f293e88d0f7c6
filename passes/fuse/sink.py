"""Sink: what is done to a Concat is done to its parts, where it then fuses with what makes them (docs/fusion.md).

`Rotary(Concat(Norm(a), Norm(b)), cos)` becomes `Concat(Rotary(Norm(a), cos[:n]), Rotary(Norm(b), cos[n:]))`: two fused
norms that write their parts of the result, instead of two norms, a copy and a Rotary. No instruction is ever added but
slices of what the parts have in common, which are views.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.convenience import convert_attributes

from onnxmesh.passes.fuse.fuse import beside_products, joins
from onnxmesh.passes.graph.build import fresh
from onnxmesh.passes.graph.match import DOMAIN, given, integer, only_user, producer, shape_of
from onnxmesh.runtime.kernels.fused import ROTARY


def sink(model: ir.Model) -> ir.Model:
    """Move elementwise ops and Rotaries from Concats to their parts, in place, as far as they fuse there."""
    _Sink(model.graph).run()
    return model


class _Sink:
    """One pass over a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.groups = beside_products(graph)
        self._slices: dict[tuple[ir.Value, int, int, int], ir.Value] = {}

    def run(self) -> None:
        for node in [node for node in self.graph if node.op_type == "Concat"]:
            concat = node if node.graph is self.graph else None
            while concat is not None:
                concat = self._move(concat)
        self.graph.sort()

    def _move(self, concat: ir.Node) -> ir.Node | None:
        """The Concat of what its only reader does to its parts; None where the reader stays."""
        value, parts = concat.outputs[0], [part for part in concat.inputs if part is not None]
        reader = only_user(value)
        axis = integer(concat, "axis") % len(shape_of(value))
        if (
            reader is None
            or not self._moves(reader, value, axis)
            or not all(joins(self.groups, part) for part in parts)
        ):
            return None
        sizes = [shape_of(part)[axis] for part in parts]
        columns = [
            parts if operand is value else self._pieces(operand, axis - len(shape_of(value)), sizes)
            for operand in reader.inputs
        ]
        if any(column is None for column in columns):
            return None
        made = [
            self._copy(reader, [column[i] for column in columns if column is not None], shape_of(part))
            for i, part in enumerate(parts)
        ]
        return self._join(concat, reader, made)

    def _moves(self, reader: ir.Node, value: ir.Value, axis: int) -> bool:
        turns = reader.op_type != ROTARY or (given(reader, 0) is value and len(value.uses()) == 1)
        within = axis < len(shape_of(value)) - 1 or len(reader.inputs) == 1
        return within and turns and self.groups.is_free(reader) and shape_of(reader.outputs[0]) == shape_of(value)

    def _pieces(self, operand: ir.Value | None, axis: int, sizes: Sequence[int]) -> list[ir.Value | None] | None:
        """What an operand is for every part; `axis` counts from the last dim. None where it would fuse as it is."""
        if operand is None or -axis > len(shape_of(operand)) or shape_of(operand)[axis] == 1:
            return [operand] * len(sizes)
        node, at = producer(operand), len(shape_of(operand)) + axis
        if node is not None and _joins(node, at, sizes):
            return list(node.inputs)
        if self.groups.is_free(node) and len(operand.uses()) == 1:
            return None
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self._slice(operand, at, start, start + size) for start, size in zip(starts, sizes)]

    def _slice(self, value: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        key = (value, axis, start, stop)
        if key not in self._slices:
            shape = list(shape_of(value))
            shape[axis] = stop - start
            attrs = convert_attributes({"axes": [axis], "starts": [start], "steps": [1]})
            node = self._node("Slice", DOMAIN, attrs, [value], shape, value)
            node.meta["origin"] = value.name
            self._slices[key] = node.outputs[0]
        return self._slices[key]

    def _copy(self, reader: ir.Node, inputs: Sequence[ir.Value | None], shape: Sequence[int]) -> ir.Value:
        """What the reader does, to one part."""
        out = reader.outputs[0]
        node = self._node(reader.op_type, reader.domain, reader.attributes.values(), inputs, shape, out)
        node.meta.update({"origin": reader.name, **reader.meta})
        return node.outputs[0]

    def _join(self, concat: ir.Node, reader: ir.Node, made: Sequence[ir.Value]) -> ir.Node:
        """The new Concat, in the place of the reader's result."""
        old = reader.outputs[0]
        node = self._node("Concat", concat.domain, concat.attributes.values(), made, shape_of(old), old)
        node.meta.update({"origin": concat.name, **concat.meta})
        new = node.outputs[0]
        new.meta.update(old.meta)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, old.name = old.name, None
        joined = {*(producer(operand, "Concat") for operand in reader.inputs), concat}
        self.graph.remove(reader, safe=True)
        self.graph.remove([join for join in joined if join is not None and _is_unused(join)], safe=True)
        return node

    def _node(
        self,
        op_type: str,
        domain: str,
        attrs: Iterable[ir.Attr],
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        like: ir.Value,
    ) -> ir.Node:
        """A node with one output, of the element type of `like`."""
        value = ir.Value(name=fresh(self.graph, like.name or op_type), shape=ir.Shape(shape), type=like.type)
        node = ir.Node(domain, op_type, inputs, attrs, outputs=[value], name=fresh(self.graph, op_type))
        self.graph.append(node)
        return node


def _joins(node: ir.Node, axis: int, sizes: Sequence[int]) -> bool:
    """Whether a node is a Concat of parts of these sizes along `axis`."""
    if node.op_type != "Concat" or integer(node, "axis") % len(shape_of(node.outputs[0])) != axis:
        return False
    return [shape_of(part)[axis] for part in node.inputs] == list(sizes)


def _is_unused(node: ir.Node) -> bool:
    return not any(value.uses() or value.is_graph_output() for value in node.outputs)
