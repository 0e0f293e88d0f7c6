"""A graph as what a scheduler needs: who waits for whom, what lies in memory, and how long everything takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from onnxmesh.compiler import cost
from onnxmesh.compiler.ir.rule import OpView, replicate
from onnxmesh.compiler.ir.view import dtype_of, shape_of, view_of
from onnxmesh.compiler.layout import place_of, renames
from onnxmesh.compiler.ops.collectives import COLLECTIVES
from onnxmesh.runtime.memory import aligned

Order = list[int]
"""The nodes by number, in the order in which they run."""


class Work:
    """The nodes of a graph by number, in its order.

    Attributes:
        before, after: the nodes that make what a node reads, and those that read what it makes.
        users: the nodes that read what a node makes, also through others that only rename it.
        reads, makes: buffers by number, of which a node reads and writes any part.
        sizes: bytes of each buffer.
        readers, writers: the nodes that read and write a buffer.
        kept: buffers that live to the end.
        sends: whether a node is a collective.
        times: predicted microseconds.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        count = len(self.nodes)
        self.before: list[list[int]] = [[] for _ in range(count)]
        self.after: list[list[int]] = [[] for _ in range(count)]
        self.users: list[list[int]] = [[] for _ in range(count)]
        self.reads: list[list[int]] = []
        self.makes: list[list[int]] = []
        self.sizes: list[int] = []
        self.readers: list[list[int]] = []
        self.writers: list[list[int]] = []
        self.sends = [node.op_type in COLLECTIVES for node in self.nodes]
        self._numbers: dict[ir.Node, int] = {}
        self._buffers: dict[ir.Value, int] = {}
        self._made: dict[ir.Value, set[int]] = {}
        for number, node in enumerate(self.nodes):
            self._add(number, node)
        outputs = (place_of(value).base for value in graph.outputs)
        self.kept = {self._buffers[base] for base in outputs if base in self._buffers}
        known: dict[OpView, float] = {}
        self.times = [_time(node, known) for node in self.nodes]

    def _add(self, number: int, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        producers = {value.producer() for value in inputs}
        for producer in sorted(self._numbers[p] for p in producers if p is not None):
            self.before[number].append(producer)
            self.after[producer].append(number)
        self._numbers[node] = number
        self.reads.append([])
        self.makes.append([])
        if renames(node):
            parts = inputs if node.op_type == "Concat" else inputs[:1]
            made = set[int]().union(*(self._made.get(value, ()) for value in parts))
            self._made.update(dict.fromkeys(node.outputs, made))
            return
        for maker in sorted(set[int]().union(*(self._made.get(value, ()) for value in inputs))):
            self.users[maker].append(number)
        self._made.update({value: {number} for value in node.outputs})
        bases = (place_of(value).base for value in inputs)
        self.reads[number] = sorted({self._buffers[base] for base in bases if base in self._buffers})
        self.makes[number] = sorted({self._buffer(place_of(value).base) for value in node.outputs})
        for buffer in self.reads[number]:
            self.readers[buffer].append(number)
        for buffer in self.makes[number]:
            self.writers[buffer].append(number)

    def _buffer(self, base: ir.Value) -> int:
        if base not in self._buffers:
            self._buffers[base] = len(self.sizes)
            self.sizes.append(aligned(cost.nbytes(shape_of(base), dtype_of(base))))
            self.readers.append([])
            self.writers.append([])
        return self._buffers[base]

    def peak(self, order: Sequence[int]) -> int:
        """The most bytes that lie in memory at once."""
        left = [len(readers) for readers in self.readers]
        begun: set[int] = set()
        live = highest = 0
        for node in order:
            live += sum(self.sizes[buffer] for buffer in self.makes[node] if buffer not in begun)
            begun.update(self.makes[node])
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
    if renames(node):
        return 0.0
    if node.op_type in COLLECTIVES:
        return send_time([node])
    view = view_of(node, 1)
    if view not in known:
        known[view] = cost.computation(view, replicate(view))
    return known[view]


def send_time(nodes: Iterable[ir.Node]) -> float:
    """Microseconds of collectives of one kind and axis, sent together."""
    sent, link = 0.0, None
    for node in nodes:
        ranks = node.attributes.get_int("ranks", 1)
        link = cost.current().link(node.op_type, ranks)
        for before, after in zip(node.inputs, node.outputs, strict=True):
            assert before is not None
            size, result = (cost.nbytes(shape_of(v), dtype_of(v)) for v in (before, after))
            sent += cost.sent(node.op_type, size, result, ranks)
    return link(sent) if link is not None else 0.0
