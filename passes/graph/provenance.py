"""Which nodes of the model a node stands for, and which decisions of placement they had.

Passes that put one node in the place of several say so here; the report tells people.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

KEY = "provenance"

Provenance = dict[str, tuple[int, ...]]
"""Name of a node before any axis was applied -> its decisions, by their numbers in the report."""


def origin(node: ir.Node) -> str:
    """The name of the model's node that a node comes from; several, with `+`, of one that does the work of all."""
    return str(node.meta.get("origin") or node.name or node.outputs[0].name or node.op_type)


def provenance(node: ir.Node) -> Provenance:
    """What a node stands for."""
    known: Provenance | None = node.meta.get(KEY)
    return known if known is not None else {origin(node): ()}


def decided(node: ir.Node, decision: int) -> None:
    """Note a decision on all that a node stands for."""
    node.meta[KEY] = {name: (*numbers, decision) for name, numbers in provenance(node).items()}


def stands_for(node: ir.Node, sources: Iterable[ir.Node]) -> None:
    """Note that a node does the work of all `sources`."""
    together: Provenance = {}
    for source in sources:
        for name, numbers in provenance(source).items():
            together[name] = tuple(dict.fromkeys((*together.get(name, ()), *numbers)))
    node.meta[KEY] = together
