"""What was decided for every class of nodes, and what else could have been, each with its predicted cost.

The cost of a choice is what it takes by itself and what its neighbours' placements, as they were chosen, make it move.
So an alternative may seem cheaper than what was chosen: only all choices together are the cheapest there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxmesh.compiler import cost
from onnxmesh.compiler.ir.rule import OpView, Strategy
from onnxmesh.passes.graph.provenance import origin
from onnxmesh.passes.place.candidates import Space
from onnxmesh.passes.place.roles import Allowed
from onnxmesh.passes.place.tie import Edge, NodeClass
from onnxmesh.runtime.placement import Placement, R, Replicate, Shard

MOST = 4
"""Alternatives of a decision: the best of so many factors."""


@dataclass(frozen=True)
class Priced:
    """A strategy, and predicted microseconds of one node: of what it does, and of moving what it reads and makes.

    `allowed` says whether the axis's role and the user's pins left it.
    """

    strategy: Strategy
    computing: float
    moving: float
    allowed: bool = True

    @property
    def total(self) -> float:
        """Microseconds of both."""
        return self.computing + self.moving


@dataclass(frozen=True)
class Decision:
    """What was chosen for nodes that look alike.

    Attributes:
        node, count: one of the nodes, and how many there are.
        alternatives: the best strategy of each other factor, the cheapest first.
        considered: how many strategies the axis's role and the user's pins left.
        reason: why it is replicated, or what the axis's role could not have.
    """

    view: OpView
    node: str
    count: int
    chosen: Priced
    alternatives: Sequence[Priced]
    considered: int
    reason: str = ""


def decisions(
    space: Space,
    allowed: Allowed,
    chosen: Sequence[Strategy],
    replicated: Mapping[int, str],
    *,
    shard_outputs: bool,
) -> tuple[Decision, ...]:
    """The decision of every class, by its index; `replicated` says why, for classes that are."""
    pricing = _Pricing(space, chosen, shard_outputs)
    found = []
    for cls, options, taken in zip(space.quotient.classes, allowed.strategies, chosen):
        others = sorted(
            pricing.others(cls, options, taken),
            key=lambda priced: (not priced.allowed, priced.total, priced.strategy.key),
        )
        found.append(
            Decision(
                cls.view,
                origin(cls.nodes[0]),
                len(cls.nodes),
                pricing.priced(cls, taken),
                [other for other in others if other.total < cost.INFINITE][:MOST],
                len(options),
                replicated.get(cls.index, allowed.notes.get(cls.index, "")),
            )
        )
    return tuple(found)


class _Pricing:
    """Prices of one class's strategies where all the others are as they were chosen."""

    def __init__(self, space: Space, chosen: Sequence[Strategy], shard_outputs: bool) -> None:
        self.space, self.chosen, self.shard_outputs = space, chosen, shard_outputs
        self._moves: dict[tuple[int, Placement, frozenset[Placement]], float] = {}

    def others(self, cls: NodeClass, options: Sequence[Strategy], taken: Strategy) -> list[Priced]:
        """The cheapest strategy of each factor but the one that was taken; an allowed one where there is any."""
        kept = {option.factor for option in options}
        groups: dict[str, list[Strategy]] = defaultdict(list)
        for option in (*options, *self.space.strategies[cls.index]):
            if option.factor != taken.factor and (option in options or option.factor not in kept):
                groups[option.factor].append(option)
        return [
            replace(self._cheapest(cls, list(dict.fromkeys(group))), allowed=factor in kept)
            for factor, group in groups.items()
        ]

    def _cheapest(self, cls: NodeClass, group: Sequence[Strategy]) -> Priced:
        by_computation = sorted(
            ((cost.computation(cls.view, option), number) for number, option in enumerate(group))
        )  # fmt: skip
        best: Priced | None = None
        for computing, number in by_computation:
            if best is not None and computing >= best.total:
                break
            priced = Priced(group[number], computing, self._moving(cls, group[number]))
            if best is None or priced.total < best.total:
                best = priced
        assert best is not None
        return best

    def priced(self, cls: NodeClass, strategy: Strategy) -> Priced:
        """One strategy's price."""
        return Priced(strategy, cost.computation(cls.view, strategy), self._moving(cls, strategy))

    def _moving(self, cls: NodeClass, strategy: Strategy) -> float:
        edges = sorted({index for indices in cls.edges.values() for index in indices})
        total = 0.0
        for index in edges:
            edge = self.space.quotient.edges[index]
            total += len(edge.values) * self._edge(edge, cls.index, strategy)
        return total / len(cls.nodes)

    def _edge(self, edge: Edge, owner: int, strategy: Strategy) -> float:
        """Microseconds of bringing one value of an edge to all who read it, where one class has this strategy."""

        def at(other: int) -> Strategy:
            return strategy if other == owner else self.chosen[other]

        made = R if edge.producer is None else at(edge.producer[0]).at(edge.producer[1])
        wanted = {at(user).at(port) for user, port in edge.consumers}
        if edge.is_output:
            wanted.add(made if self.shard_outputs and isinstance(made, Shard) else R)
        key = (edge.index, made, frozenset(wanted))
        if key not in self._moves:
            self._moves[key] = self._move(edge, made, sorted(wanted - {made}, key=str))
        return self._moves[key]

    def _move(self, edge: Edge, made: Placement, wanted: Sequence[Placement]) -> float:
        """Each placement directly, or all by way of the whole: whichever is cheaper."""
        size, ranks = cost.nbytes(edge.shape, edge.dtype), self.space.quotient.ranks

        def change(before: Placement, after: Placement) -> float:
            return cost.reshard(size, before, after, ranks)

        direct = sum(change(made, placement) for placement in wanted)
        if isinstance(made, Replicate) or len(wanted) < 2:
            return direct
        return min(direct, change(made, R) + sum(change(R, placement) for placement in wanted))
