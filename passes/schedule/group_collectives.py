"""Group collectives: independent collectives of one kind and axis become one instruction (docs/fusion.md).

A library runs a group in one launch, so that its members pay for the latency once: the queries, keys and values that
Ulysses sends, the two shifts of a ring's step. The earlier ones wait for the last, so they are grouped only where that
takes no longer by the cost model, on one stream for computation and one for collectives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxmesh.compiler.ir.view import plain_attrs
from onnxmesh.compiler.layout import rebase
from onnxmesh.passes.graph.provenance import stands_for
from onnxmesh.passes.schedule.schedule import streams
from onnxmesh.passes.schedule.work import Work, send_time

NEGLIGIBLE = 0.1
"""Microseconds; a launch less is worth more."""
_COMMON = ("axis", "ranks")
REASONS = "reasons"
"""`meta` key of a group: who wanted each of its results."""


def group_collectives(model: ir.Model) -> ir.Model:
    """Group the collectives of a rank's scheduled graph, in place, and note anew which stream each runs on."""
    graph = model.graph
    work = Work(graph)
    groups = [group for group in _Groups(work).find() if len(group) > 1]
    if not groups:
        return model
    order: list[ir.Node | None] = list(work.nodes)
    renamed: dict[ir.Value, ir.Value] = {}
    for group in groups:
        members = [work.nodes[number] for number in group]
        for number in group:
            order[number] = None
        order[group[-1]] = _joined(members, renamed)
        graph.remove(members, safe=True)
    _order(graph, [node for node in order if node is not None])
    rebase(graph, renamed)
    work = Work(graph)
    for number, stream in streams(work, range(len(work.nodes))).items():
        work.nodes[number].meta["stream"] = stream
    return model


# --- which ones ---------------------------------------------------------------------------------------------


class _Groups:
    """The collectives of a schedule by number, in groups that may as well run in the place of their last member."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.makers: list[list[int]] = [[] for _ in work.nodes]
        for maker, users in enumerate(work.users):
            for user in users:
                self.makers[user].append(maker)

    def find(self) -> list[list[int]]:
        """All groups, in the order of their first members."""
        found: list[list[int]] = []
        current: dict[tuple[Any, ...], list[int]] = {}
        for number, node in enumerate(self.work.nodes):
            if not self.work.sends[number]:
                continue
            attrs = plain_attrs(node)
            key = (node.op_type, attrs["axis"], attrs.get("reduce"))
            group = current.get(key)
            if group is not None and number < self._first_user(group) and self._gains(group, number):
                group.append(number)
            else:
                current[key] = [number]
                found.append(current[key])
        return found

    def _first_user(self, members: Iterable[int]) -> int:
        users = (user for member in members for user in self.work.users[member])
        return min(users, default=len(self.work.nodes))

    def _gains(self, members: Sequence[int], number: int) -> bool:
        """Whether the members and one more run together no later than the members, and then the one."""
        end = min(self._first_user([*members, number]) + 1, len(self.work.nodes))
        apart = self._time(members[0], end, {members[-1]: members})
        together = self._time(members[0], end, {number: [*members, number]})
        return together <= apart + NEGLIGIBLE

    def _time(self, start: int, end: int, groups: Mapping[int, Sequence[int]]) -> float:
        """Microseconds of the nodes from `start` to `end`, where the members of a group run in the place of its key.

        A collective that nothing is computed beside runs on the stream of the computation.
        """
        work, ends, free = self.work, dict[int, float](), [0.0, 0.0]
        moved = {member for members in groups.values() for member in members} - groups.keys()
        order = [number for number in range(start, end) if work.times[number] and number not in moved]
        for at, number in enumerate(order):
            members, sends, took = groups.get(number, [number]), work.sends[number], work.times[number]
            if len(members) > 1:
                took = send_time(work.nodes[member] for member in members)
            computed = next((n for n in order[at + 1 :] if not work.sends[n]), end)
            stream = int(sends and computed < self._first_user(members))
            ready = max((ends.get(maker, 0.0) for member in members for maker in self.makers[member]), default=0.0)
            free[stream] = max(free[stream], ready) + took
            ends.update(dict.fromkeys(members, free[stream]))
        return max(free)


# --- one instruction ----------------------------------------------------------------------------------------


def _joined(nodes: Sequence[ir.Node], renamed: dict[ir.Value, ir.Value]) -> ir.Node:
    """One collective with the inputs and outputs of all; where their attributes differ they are a list, `each`."""
    first = nodes[0]
    attributes = {name: first.attributes[name] for name in _COMMON}
    each = [{name: value for name, value in plain_attrs(node).items() if name not in _COMMON} for node in nodes]
    if all(attrs == each[0] for attrs in each):
        attributes = dict(first.attributes)
    else:
        attributes["each"] = ir.AttrString("each", json.dumps(each, sort_keys=True, separators=(",", ":")))
    inputs = [value for node in nodes for value in node.inputs]
    olds = [value for node in nodes for value in node.outputs]
    outputs = [ir.Value(name=old.name, shape=old.shape, type=old.type) for old in olds]
    group = ir.Node(first.domain, first.op_type, inputs, attributes.values(), outputs=outputs, name=first.name)
    group.meta["origin"] = "+".join(dict.fromkeys(str(node.meta.get("origin", node.name)) for node in nodes))
    stands_for(group, nodes)
    group.meta[REASONS] = [str(node.meta.get("reason", "")) for node in nodes]
    group.meta["reason"] = " | ".join(dict.fromkeys(group.meta[REASONS]))
    for old, new in zip(olds, outputs):
        new.meta.update(old.meta)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
    renamed.update(zip(olds, outputs))
    return group


def _order(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Put the nodes into the graph in this order; views of what now comes later follow it."""
    known = {*graph.inputs, *graph.initializers.values()}
    waiting: list[ir.Node] = []
    for node in nodes:
        waiting.append(node)
        while ready := [soon for soon in waiting if all(value is None or value in known for value in soon.inputs)]:
            for soon in ready:
                graph.append(soon)
                known.update(soon.outputs)
                waiting.remove(soon)
    assert not waiting
