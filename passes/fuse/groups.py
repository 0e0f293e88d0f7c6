"""Groups of nodes that become one instruction, and what may join them.

A group has one output that is read outside, its root's; a norm's group may have a second one. The second output must
not be able to close a cycle: the nodes are ranked by their depth in the graph, and what the rest of such a group reads
must stand before the second output in that order, so that all of the group can run where the second output was made.

What several groups read may be computed in each of them; its nodes then belong to all of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from math import prod

import onnx_ir as ir

from onnxmesh.compiler.ir.rule import itemsize
from onnxmesh.compiler.ir.view import dtype_of, shape_of
from onnxmesh.runtime.dtypes import is_for_hosts
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE
from onnxmesh.runtime.kernels.fused import ROTARY

LIMIT = 48
"""Ops in an expression, each counted as often as it stands there."""

SMALL = 1 << 16
"""Bytes that are read again rather than made by a kernel of its own: a launch takes longer."""

CHEAP = frozenset({"Abs", "Add", "Cast", "Max", "Min", "Mul", "Neg", "Sub", "Where"})
"""Ops that may be computed again for every row, or head, that they are the same for."""


@dataclass
class Group:
    """Nodes that become one.

    Attributes:
        root: makes the value.
        core: the MatMul or the norm among elementwise nodes.
        times: how often each node stands in the expression.
        second: a value within the group that is also read outside.
    """

    root: ir.Node
    core: ir.Node | None = None
    times: dict[ir.Node, int] = field(default_factory=dict)
    second: ir.Value | None = None

    @property
    def size(self) -> int:
        """Ops in the expression."""
        return sum(self.times.values())

    def reads(self) -> Iterator[ir.Value]:
        """What comes from outside."""
        for node in self.times:
            for value in node.inputs:
                if value is not None and value.producer() not in self.times:
                    yield value


def _is_for_hosts(node: ir.Node) -> bool:
    """Whether a node reads or makes what GPUs have no arrays of: it runs on the host there, and nothing else should."""
    return any(value is not None and _has_no_arrays(value.dtype) for value in (*node.inputs, *node.outputs))


@cache
def _has_no_arrays(dtype: ir.DataType | None) -> bool:
    return dtype is not None and is_for_hosts(dtype.numpy())


class Groups:
    """All groups of a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.rank = _ranked(graph)
        self.nodes = sorted(self.rank, key=self.rank.__getitem__)
        self.all: list[Group] = []
        self._of: dict[ir.Node, list[Group]] = {}

    def is_free(self, node: ir.Node | None) -> bool:
        """Whether the node is elementwise or a Rotary, in no group, and of dtypes that GPUs compute with."""
        if node is None or node in self._of:
            return False
        return (node.op_type in ELEMENTWISE or node.op_type == ROTARY) and not _is_for_hosts(node)

    def start(self, path: list[ir.Node], core: ir.Node | None = None) -> Group:
        """A group of a chain of nodes, the last of which is the root."""
        group = Group(path[-1], core)
        self.all.append(group)
        for node in reversed(path):
            self._add(group, node)
        return group

    def grow(self, group: Group) -> None:
        """Let join what only this group reads."""
        waiting: list[int] = []

        def push(node: ir.Node) -> None:
            for value in node.inputs:
                producer = value.producer() if value is not None else None
                if producer is not None and self.is_free(producer):
                    heapq.heappush(waiting, -self.rank[producer])

        for node in group.times:
            push(node)
        while waiting:
            node = self.nodes[-heapq.heappop(waiting)]
            if self.is_free(node) and self._is_inside(node, group) and self._fits(node, group):
                self._add(group, node)
                push(node)

    def share(self, group: Group, value: ir.Value) -> bool:
        """Let the node that makes `value` join although others read the value too; False where it cannot be."""
        node = value.producer()
        if node is None or not self.is_free(node) or not self._fits(node, group):
            return False
        for other in group.reads():
            producer = other.producer()
            if producer is not None and producer is not node and self.rank[producer] > self.rank[node]:
                return False
        group.second = value
        self._add(group, node)
        self.grow(group)
        return True

    def dissolve(self, group: Group) -> bool:
        """Let all groups that read what a group makes compute it themselves; False where that does not pay."""
        value = group.root.outputs[0]
        readers = self._readers(value)
        if not readers or value.is_graph_output() or any(node.op_type == ROTARY for node in group.times):
            return False
        read = sum(_bytes(other) for other in set(group.reads()))
        if read > max(_bytes(value), SMALL) or not all(self._takes_in(reader, group) for reader in readers):
            return False
        self.all.remove(group)
        for node in group.times:
            del self._of[node]
        for reader in readers:
            for node in group.times:
                self._add(reader, node)
        return True

    def _readers(self, value: ir.Value) -> list[Group]:
        """The groups that read a value; none where something else does, or a Rotary as its table."""
        found: dict[int, Group] = {}
        for use in value.uses():
            if use.node not in self._of or (use.node.op_type == ROTARY and use.idx > 0):
                return []
            found |= {id(group): group for group in self._of[use.node]}
        return list(found.values())

    def _takes_in(self, reader: Group, group: Group) -> bool:
        """Whether a group may compute what another one makes: not in an epilogue, nor dearly for many elements."""
        if reader.core is not None and reader.core.op_type == "MatMul":
            return False
        wider = prod(shape_of(reader.root.outputs[0])) > prod(shape_of(group.root.outputs[0]))
        if wider and not all(node.op_type in CHEAP for node in group.times):
            return False
        if reader.second is not None:
            sum_ = reader.second.producer()
            producers = [other.producer() for other in group.reads()]
            if sum_ is None or any(node is not None and self.rank[node] > self.rank[sum_] for node in producers):
                return False
        return reader.size + self._times(group.root, reader) * group.size <= LIMIT

    def _add(self, group: Group, node: ir.Node) -> None:
        group.times[node] = self._times(node, group) or 1
        self._of.setdefault(node, []).append(group)

    def _times(self, node: ir.Node, group: Group) -> int:
        return sum(group.times.get(use.node, 0) for use in node.outputs[0].uses())

    def _fits(self, node: ir.Node, group: Group) -> bool:
        return group.size + self._times(node, group) <= LIMIT and (node.op_type != ROTARY or _may_rotate(group, node))

    def _is_inside(self, node: ir.Node, group: Group) -> bool:
        """Whether only the group reads what the node makes, and not as a table of a Rotary."""
        value = node.outputs[0]
        tables = (use.node.op_type == ROTARY and use.idx > 0 for use in value.uses())
        inside = all(user in group.times for user in value.consumers())
        return inside and not value.is_graph_output() and not any(tables)


def _bytes(value: ir.Value) -> int:
    return prod(shape_of(value)) * itemsize(dtype_of(value))


def _may_rotate(group: Group, node: ir.Node) -> bool:
    """Whether a Rotary may join: the first one, not before a norm, and of the result's shape."""
    first = group.core is None and all(member.op_type != ROTARY for member in group.times)
    return first and shape_of(node.outputs[0]) == shape_of(group.root.outputs[0])


def _ranked(graph: ir.Graph) -> dict[ir.Node, int]:
    """The place of every node in an order by depth: what depends on little comes early."""
    depth: dict[ir.Node, int] = {}
    for node in graph:
        producers = [value.producer() for value in node.inputs if value is not None]
        depth[node] = 1 + max((depth[p] for p in producers if p is not None), default=0)
    order = sorted(depth, key=depth.__getitem__)
    return {node: i for i, node in enumerate(order)}
