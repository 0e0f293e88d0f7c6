"""Tie what repeats: nodes that look alike from near get one decision.

Weisfeiler-Lehman colouring: a node's colour starts from its op, attributes, shapes and dtypes, and eight times takes
in the colours of its neighbours. Colours know no names and no order of nodes, so neither does what is decided on
them. More rounds would separate the blocks of a model by their distance from its ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import onnx_ir as ir

from onnxmesh.compiler.ir.rule import OpView, Port, Shape
from onnxmesh.compiler.ir.view import dtype_of, is_constant, shape_of, views_of

ROUNDS = 8


@dataclass
class NodeClass:
    """Nodes that get one strategy."""

    index: int
    view: OpView
    nodes: list[ir.Node]
    edges: dict[Port, set[int]] = field(default_factory=lambda: defaultdict(set))


@dataclass(frozen=True)
class Edge:
    """Values that one class (or graph input: `producer` is None) makes and the same classes use."""

    index: int
    shape: Shape
    dtype: str
    producer: tuple[int, Port] | None
    consumers: tuple[tuple[int, Port], ...]
    is_output: bool
    values: tuple[ir.Value, ...]

    @property
    def ports(self) -> list[tuple[int, Port]]:
        """The producer's and the consumers' ends."""
        return ([self.producer] if self.producer else []) + list(self.consumers)


@dataclass
class Quotient:
    """The graph of classes."""

    ranks: int
    classes: list[NodeClass]
    edges: list[Edge]
    class_of: dict[ir.Node, int]


def tie(graph: ir.Graph, ranks: int, marks: Mapping[ir.Node, str] | None = None) -> Quotient:
    """The classes of a graph's nodes, in an order that depends on neither names nor the order of nodes.

    Nodes with different `marks` are in different classes.
    """
    views = views_of(graph, ranks)
    colours = _colours(graph, views, marks or {})
    order = sorted(set(colours.values()))
    number = {colour: i for i, colour in enumerate(order)}
    class_of = {node: number[colours[node]] for node in graph}
    members: list[list[ir.Node]] = [[] for _ in order]
    for node in graph:
        members[class_of[node]].append(node)
    classes = [NodeClass(i, views[nodes[0]], nodes) for i, nodes in enumerate(members)]
    edges = _edges(graph, class_of)
    for edge in edges:
        for owner, port in edge.ports:
            classes[owner].edges[port].add(edge.index)
    return Quotient(ranks, classes, edges, class_of)


def _digest(*parts: Any) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=12).digest()


def _colours(graph: ir.Graph, views: dict[ir.Node, OpView], marks: Mapping[ir.Node, str]) -> dict[ir.Node, bytes]:
    inputs = {value: _digest("input", i) for i, value in enumerate(graph.inputs)}
    outputs = {value: i for i, value in enumerate(graph.outputs)}
    colours = {
        node: _digest(v.op, v.ins, v.outs, v.in_dtypes, v.out_dtypes, v.constant, v.fixed, v.attrs)
        for node, v in views.items()
    }
    colours |= {node: _digest(colours[node], mark) for node, mark in marks.items()}
    for _ in range(ROUNDS):
        colours = {node: _next_colour(node, colours, inputs, outputs) for node in views}
    return colours


def _next_colour(
    node: ir.Node, colours: dict[ir.Node, bytes], inputs: dict[ir.Value, bytes], outputs: dict[ir.Value, int]
) -> bytes:
    sources = []
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if value is None or is_constant(value):
            sources.append(b"-" if value is None else b"c")
        elif producer is None:
            sources.append(inputs[value])
        else:
            sources.append(colours[producer] + bytes([value.index() or 0]))
    users = [
        (sorted((colours[user.node], user.idx) for user in value.uses()), outputs.get(value)) for value in node.outputs
    ]
    return _digest(colours[node], sources, users)


def _edges(graph: ir.Graph, class_of: dict[ir.Node, int]) -> list[Edge]:
    groups: dict[tuple[Any, ...], list[ir.Value]] = defaultdict(list)
    outputs = set(graph.outputs)
    inputs = {value: i for i, value in enumerate(graph.inputs)}
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        producer = value.producer()
        source = (-1, inputs[value]) if producer is None else (class_of[producer], value.index() or 0)
        users = tuple(sorted({(class_of[user.node], user.idx) for user in value.uses()}))
        groups[source, users, value in outputs].append(value)
    edges = []
    for i, (key, members) in enumerate(sorted(groups.items(), key=lambda item: item[0])):
        (owner, position), users, is_output = key
        made = None if owner < 0 else (owner, Port(True, position))
        used = tuple((user, Port(False, at)) for user, at in users)
        first = members[0]
        edges.append(Edge(i, shape_of(first), dtype_of(first), made, used, is_output, tuple(members)))
    return edges
