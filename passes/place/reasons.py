"""Why a node runs replicated on an axis, in words for the report."""

from __future__ import annotations

from collections.abc import Sequence

from onnxmesh.compiler.ir import rule
from onnxmesh.compiler.ir.loose import why_apart
from onnxmesh.compiler.ir.rule import Strategy
from onnxmesh.compiler.reason import Reason
from onnxmesh.passes.place.roles import Allowed
from onnxmesh.passes.place.tie import NodeClass


def why_replicated(cls: NodeClass, found: Sequence[Strategy], axis: str, allowed: Allowed) -> str:
    """The reason, with its code, for a class of nodes whose chosen strategy is to replicate.

    Args:
        found: the strategies that its rule gave, the replicated one among them.
        allowed: what the axis's role left of them.
    """
    view = cls.view
    if cls.index in allowed.notes:
        return allowed.notes[cls.index]
    if rule.find(view.op) is None:
        return why_apart(view.op) or Reason(f"no rule for {view.op}", "OM2104")
    if len(found) < 2:
        return Reason(f"none of its dims can be cut for {view.ranks} ranks", "OM2108")
    if len(allowed.strategies[cls.index]) < 2:
        words = f"the {axis} axis leaves no other way: it keeps weights whole and sequences together"
        return Reason(words, "OM2109")
    return Reason("cheaper than to cut it, which would send more than it saves", "OM2110")
