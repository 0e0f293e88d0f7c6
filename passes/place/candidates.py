"""Enumerate the strategies of every class of nodes on one axis.

Every dim starts with its natural cuts; the rules carry them to the neighbours, both ways, until nothing new comes.
That is where segmentations come from: nobody guesses them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from onnxmesh.compiler.ir import rule, segments
from onnxmesh.compiler.ir.rule import Port, Strategy
from onnxmesh.passes.place.tie import Edge, Quotient
from onnxmesh.runtime.placement import Placement, Replicate, Shard

CUTS_PER_DIM = 24

Pinned = Mapping[ir.Node, Mapping[Port, Placement]]
_NOTHING: Pinned = {}


@dataclass
class Space:
    """What may be chosen: strategies by class (the replicated one first), and the placements seen on each edge."""

    quotient: Quotient
    strategies: list[list[Strategy]]
    placements: list[list[Placement]]


def enumerate_strategies(quotient: Quotient, pinned: Pinned = _NOTHING) -> Space:
    """All strategies that follow from the natural cuts of all dims, and from what is pinned."""
    found: list[dict[Strategy, None]] = [{rule.replicate(c.view): None} for c in quotient.classes]
    seen: list[dict[Placement, None]] = [{} for _ in quotient.edges]
    queue: deque[tuple[Edge, Placement]] = deque()

    def admit(edge: Edge, placement: Placement) -> None:
        if isinstance(placement, Replicate) or placement in seen[edge.index]:
            return
        if isinstance(placement, Shard):
            same = [p for p in seen[edge.index] if isinstance(p, Shard) and p.dim == placement.dim]
            if len(same) >= CUTS_PER_DIM:
                return
        seen[edge.index][placement] = None
        queue.append((edge, placement))

    for edge in quotient.edges:
        for dim, size in enumerate(edge.shape):
            for cut in segments.natural(size, quotient.ranks):
                admit(edge, Shard(dim, cut))

    def add(owner: int, strategies: Iterable[Strategy]) -> None:
        for strategy in strategies:
            if strategy not in found[owner]:
                found[owner][strategy] = None
                _spread(quotient, owner, strategy, admit)

    for node, ports in pinned.items():
        view = quotient.classes[quotient.class_of[node]].view
        op = rule.find(view.op)
        for port, placement in ports.items():
            if op is not None and isinstance(placement, Shard):
                add(quotient.class_of[node], op.strategies(view, port, placement))
    cache: dict[tuple[rule.OpView, Port, Placement], list[Strategy]] = {}
    while queue:
        edge, placement = queue.popleft()
        for owner, port in edge.ports:
            view = quotient.classes[owner].view
            key = (view, port, placement)
            op = rule.find(view.op)
            if op is None:
                continue
            if op.pairs is not None:
                strategies = list(op.strategies(view, port, placement, partial(_seen, quotient, seen, owner)))
            elif key in cache:
                strategies = cache[key]
            else:
                strategies = cache[key] = list(op.strategies(view, port, placement))
            add(owner, strategies)
    ordered = [[first, *sorted(rest, key=lambda s: s.key)] for first, *rest in map(list, found)]
    return Space(quotient, ordered, [sorted(p, key=str) for p in seen])


def _seen(quotient: Quotient, seen: list[dict[Placement, None]], owner: int, port: Port) -> Iterable[Placement]:
    """The placements known so far at a port of a class."""
    edges = quotient.classes[owner].edges
    return [placement for index in sorted(edges.get(port, ())) for placement in seen[index]]


def _spread(quotient: Quotient, owner: int, strategy: Strategy, admit: object) -> None:
    """Carry a new strategy's placements to the edges of all its ports."""
    for port, edges in sorted(quotient.classes[owner].edges.items()):
        for index in sorted(edges):
            admit(quotient.edges[index], strategy.at(port))  # type: ignore[operator]
