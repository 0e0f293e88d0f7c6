"""Schedule: the order in which a rank runs its nodes (docs/fusion.md).

All ranks run one program, so whatever the order is, they meet the same collectives. A few orders are made by list
scheduling; the fastest of those that need hardly more memory than the given one is taken.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import product

import onnx_ir as ir

from onnxmesh.passes.schedule.work import Order, Work

MORE_MEMORY = 1.05
"""How much more than the given order's peak an order may take."""
AS_FAST = 1.01
"""Orders within this factor of the fastest are equal; the one with the lowest peak is taken."""


def schedule(model: ir.Model) -> ir.Model:
    """Reorder a rank's graph, in place, and note on its collectives which stream they run on."""
    graph = model.graph
    work = Work(graph)
    order = best(work)
    for number, stream in streams(work, order).items():
        work.nodes[number].meta["stream"] = stream
    for number in order:
        graph.append(work.nodes[number])
    return model


def best(work: Work) -> Order:
    """The order to run."""
    found = [(work.time(order), work.peak(order), order) for order in candidates(work)]
    small = [entry for entry in found if entry[1] <= MORE_MEMORY * found[0][1]]
    fastest = min(time for time, _, _ in small)
    return min((peak, order) for time, peak, order in small if time <= AS_FAST * fastest)[1]


def candidates(work: Work) -> Iterator[Order]:
    """Orders worth comparing; the first is the given one, in which only shifts are issued before what they overlap."""
    given = range(len(work.nodes))
    for frees in (False, True):
        yield _List(work, given, frees=frees, overlap=False).run()
    for priority, frees in product((given, _positions(depth_first(work))), (False, True)):
        yield _List(work, priority, frees=frees, overlap=True).run()


def depth_first(work: Work) -> Order:
    """Everything as late as possible: before a node what it needs, the longest chain first."""
    depth = [0] * len(work.nodes)
    for node in range(len(work.nodes)):
        depth[node] = 1 + max((depth[p] for p in work.before[node]), default=0)
    order: Order = []
    seen = [False] * len(work.nodes)
    sinks = [node for node in range(len(work.nodes)) if not work.after[node]]
    for sink in sinks:
        stack = [(sink, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
            elif not seen[node]:
                seen[node] = True
                stack.append((node, True))
                stack += [(p, False) for p in sorted(work.before[node], key=lambda p: (depth[p], -p))]
    return order


def streams(work: Work, order: Sequence[int]) -> dict[int, int]:
    """The stream of every collective: 1 where something else is computed before its result is needed."""
    at = _positions(order)
    computing = [node for node in order if not work.sends[node] and work.makes[node]]
    places = [at[node] for node in computing]
    result = {}
    for node in range(len(work.nodes)):
        if work.sends[node]:
            first = min((at[user] for user in work.users[node]), default=len(order))
            following = bisect_right(places, at[node])
            result[node] = int(following < len(places) and places[following] < first)
    return result


def _positions(order: Sequence[int]) -> list[int]:
    at = [0] * len(order)
    for position, node in enumerate(order):
        at[node] = position
    return at


class _List:
    """List scheduling: of the nodes that can run, the one with the lowest priority first.

    Args:
        frees: before it, whatever makes memory no fuller.
        overlap: collectives go as soon as their inputs are there, and what waits for one that is under way comes later.
    """

    def __init__(self, work: Work, priority: Sequence[int], *, frees: bool, overlap: bool) -> None:
        self.work, self.priority = work, priority
        self.frees, self.overlap = frees, overlap
        self.order: Order = []
        self.missing = [len(before) for before in work.before]
        self.left = [len(readers) for readers in work.readers]
        self.done = [False] * len(work.nodes)
        self.begun = [False] * len(work.sizes)
        self.ends = [0.0] * len(work.nodes)
        self.clocks = [0.0, 0.0]
        self.first: list[tuple[int, int]] = []  # frees memory, or sends
        self.ready: list[tuple[int, int]] = []
        self.waiting: list[tuple[float, int, int]] = []  # for what is under way

    def run(self) -> Order:
        """The order."""
        for source in (node for node, missing in enumerate(self.missing) if not missing):
            self._offer(source)
        while (node := self._next()) is not None:
            for each in [*self._shifts_beside(node), node]:
                self._issue(each)
        return self.order

    def _next(self) -> int | None:
        while self.waiting and self.waiting[0][0] <= self.clocks[0]:
            self._rank(heapq.heappop(self.waiting)[2])
        for heap in (self.first, self.ready):
            while heap:
                soon = heapq.heappop(heap)[1]
                if not self.done[soon]:
                    return soon
        while self.waiting:
            late = heapq.heappop(self.waiting)[2]
            if not self.done[late]:
                return late
        return None

    def _offer(self, node: int) -> None:
        """A node whose inputs are all issued."""
        start = max((self.ends[p] for p in self.work.before[node]), default=0.0)
        if self.overlap and start > self.clocks[0] and not self.work.sends[node]:
            heapq.heappush(self.waiting, (start, self.priority[node], node))
        else:
            self._rank(node)

    def _rank(self, node: int) -> None:
        urgent = self._is_early(node) or self._frees(node)
        heapq.heappush(self.first if urgent else self.ready, (self.priority[node], node))

    def _is_early(self, node: int) -> bool:
        """A shift waits until its input is used: else the whole ring would lie in memory at once."""
        return self.overlap and self.work.sends[node] and self.work.nodes[node].op_type != "Shift"

    def _frees(self, node: int) -> bool:
        """Whether memory is no fuller after a node."""
        work = self.work
        freed = (b for b in work.reads[node] if self.left[b] == 1 and b not in work.kept)
        made = (b for b in work.makes[node] if not self.begun[b])
        return self.frees and sum(work.sizes[b] for b in made) <= sum(work.sizes[b] for b in freed)

    def _shifts_beside(self, node: int) -> list[int]:
        """The shifts that can run, of what this node reads: they send it on while the node computes."""
        beside = {user for buffer in self.work.reads[node] for user in self.work.readers[buffer]}
        return sorted(
            user
            for user in beside
            if user != node
            and self.work.nodes[user].op_type == "Shift"
            and not self.missing[user]
            and not self.done[user]
        )

    def _issue(self, node: int) -> None:
        work = self.work
        self.order.append(node)
        self.done[node] = True
        stream = int(work.sends[node])
        start = max([self.clocks[stream], *(self.ends[p] for p in work.before[node])])
        self.ends[node] = self.clocks[stream] = start + work.times[node]
        for buffer in work.makes[node]:
            if not self.begun[buffer]:
                self.begun[buffer] = True
                self._hurry(work.writers[buffer])
        for buffer in work.reads[node]:
            self.left[buffer] -= 1
            if self.left[buffer] == 1:
                self._hurry(work.readers[buffer])
        for user in work.after[node]:
            self.missing[user] -= 1
            if not self.missing[user]:
                self._offer(user)

    def _hurry(self, nodes: Sequence[int]) -> None:
        """Run those first that can run, and now make memory no fuller."""
        for node in nodes:
            if not self.done[node] and not self.missing[node] and self._frees(node):
                heapq.heappush(self.first, (self.priority[node], node))
