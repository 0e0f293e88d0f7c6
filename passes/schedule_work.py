"""A graph as what a scheduler needs: who waits for whom, what lies in memory, and how long everything takes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxmesh.compiler import cost
from onnxmesh.compiler.ir.rule import OpView, replicate
from onnxmesh.compiler.ir.view import dtype_of, shape_of, view_of
from onnxmesh.compiler.lower import COLLECTIVES, VIEWS
from onnxmesh.compiler.memory import aligned

Order = list[int]
"""The nodes by number, in the order in which they run."""


class Work:
    """The nodes of a graph by number, in its order.

    Attributes:
        before, after: the nodes that make what a node reads, and those that read what it makes.
        reads, makes: buffers by number; a view is no buffer of its own.
        sizes: bytes of each buffer.
        readers: the nodes that read a buffer.
        kept: buffers that live to the end.
        sends: whether a node is a collective.
        times: predicted microseconds.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        count = len(self.nodes)
        self.before: list[list[int]] = [[] for _ in range(count)]
        self.after: list[list[int]] = [[] for _ in range(count)]
        self.reads: list[list[int]] = []
        self.makes: list[list[int]] = []
        self.sizes: list[int] = []
        self.readers: list[list[int]] = []
        self.sends = [node.op_type in COLLECTIVES for node in self.nodes]
        self._numbers: dict[ir.Node, int] = {}
        self._buffers: dict[ir.Value, int] = {}
        for number, node in enumerate(self.nodes):
            self._add(number, node)
        self.kept = {self._buffers[value] for value in graph.outputs if value in self._buffers}
        known: dict[OpView, float] = {}
        self.times = [_time(node, known) for node in self.nodes]

    def _add(self, number: int, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        producers = {value.producer() for value in inputs}
        for producer in sorted(self._numbers[p] for p in producers if p is not None):
            self.before[number].append(producer)
            self.after[producer].append(number)
        self._numbers[node] = number
        read = sorted({self._buffers[value] for value in inputs if value in self._buffers})
        self.reads.append(read)
        for buffer in read:
            self.readers[buffer].append(number)
        self.makes.append([])
        for value in node.outputs:
            if node.op_type in VIEWS:
                if inputs[0] in self._buffers:
                    self._buffers[value] = self._buffers[inputs[0]]
            else:
                self._buffers[value] = len(self.sizes)
                self.makes[number].append(len(self.sizes))
                self.sizes.append(aligned(cost.nbytes(shape_of(value), dtype_of(value))))
                self.readers.append([])

    def peak(self, order: Sequence[int]) -> int:
        """The most bytes that lie in memory at once."""
        left = [len(readers) for readers in self.readers]
        live = highest = 0
        for node in order:
            live += sum(self.sizes[buffer] for buffer in self.makes[node])
            highest = max(highest, live)
            for buffer in self.reads[node]:
                left[buffer] -= 1
            for buffer in {*self.reads[node], *self.makes[node]}:
                if not left[buffer] and buffer not in self.kept:
                    live -= self.sizes[buffer]
        return highest

    def time(self, order: Sequence[int]) -> float:
        """Microseconds when computation and collectives are one stream each."""
        ends = [0.0] * len(self.nodes)
        free = [0.0, 0.0]
        for node in order:
            stream = int(self.sends[node])
            start = max([free[stream], *(ends[i] for i in self.before[node])])
            ends[node] = free[stream] = start + self.times[node]
        return max(free)


def _time(node: ir.Node, known: dict[OpView, float]) -> float:
    if node.op_type in VIEWS:
        return 0.0
    if node.op_type in COLLECTIVES:
        return _send_time(node)
    view = view_of(node, 1)
    if view not in known:
        known[view] = cost.computation(view, replicate(view))
    return known[view]


def _send_time(node: ir.Node) -> float:
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    ranks = node.attributes.get_int("ranks", 1)
    size, result = (cost.nbytes(shape_of(v), dtype_of(v)) for v in (before, after))
    return cost.current().link(node.op_type, ranks)(cost.sent(node.op_type, size, result, ranks))
