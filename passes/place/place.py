"""Place: one strategy for every node on one mesh axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxmesh.compiler.ir.rule import OpView, Strategy
from onnxmesh.compiler.options import CpStrategy
from onnxmesh.passes.place.candidates import enumerate_strategies
from onnxmesh.passes.place.decisions import Decision, decisions
from onnxmesh.passes.place.pins import Pin, Pinned, pinned
from onnxmesh.passes.place.reasons import why_replicated
from onnxmesh.passes.place.roles import constrain
from onnxmesh.passes.place.solve import solve
from onnxmesh.passes.place.tie import tie


@dataclass(frozen=True)
class Placed:
    """What was chosen on one axis, before anything is moved.

    Attributes:
        strategies, views: by node.
        self_attention: nodes that the cp axis pins.
        notes: what the axis's role could not have, by node.
        replicated: why, by node, for the nodes that every rank computes whole.
        classes: how many decisions there were.
        pinned: what the user's pins asked for.
        decisions: what was chosen for every class of nodes, and what else could have been.
        decision_of: by node, the number of its decision.
    """

    axis: str
    ranks: int
    strategies: Mapping[ir.Node, Strategy]
    views: Mapping[ir.Node, OpView]
    self_attention: frozenset[ir.Node] = frozenset()
    notes: Mapping[ir.Node, str] = field(default_factory=dict)
    replicated: Mapping[ir.Node, str] = field(default_factory=dict)
    classes: int = 0
    pinned: Pinned = field(default_factory=Pinned)
    decisions: Sequence[Decision] = ()
    decision_of: Mapping[ir.Node, int] = field(default_factory=dict)


def place(
    graph: ir.Graph, axis: str, ranks: int, *, cp_strategy: CpStrategy, shard_outputs: bool, pins: Sequence[Pin] = ()
) -> Placed:
    """Choose the strategies of all nodes on `axis`, among those that `pins` leave.

    Raises:
        ModelError: two pins contradict each other.
    """
    wanted = pinned(graph, axis, ranks, pins)
    quotient = tie(graph, ranks, wanted.marks)
    space = enumerate_strategies(quotient, wanted.at)
    allowed = constrain(space, axis, cp_strategy, [wanted.apply])
    chosen = solve(space, allowed, shard_outputs=shard_outputs)
    classes = quotient.classes
    whole = {
        cls.index: why_replicated(cls, space.strategies[cls.index], axis, allowed)
        for cls in classes
        if chosen[cls.index].factor == "replicate"
    }
    return Placed(
        axis,
        ranks,
        {node: chosen[index] for node, index in quotient.class_of.items()},
        {node: classes[index].view for node, index in quotient.class_of.items()},
        frozenset(node for index in allowed.self_attention for node in classes[index].nodes),
        {node: note for index, note in allowed.notes.items() for node in classes[index].nodes},
        {node: reason for index, reason in whole.items() for node in classes[index].nodes},
        len(classes),
        wanted,
        decisions(space, allowed, chosen, whole, shard_outputs=shard_outputs),
        quotient.class_of,
    )
