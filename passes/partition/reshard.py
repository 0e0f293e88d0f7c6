"""Reshard: the collectives that lead from one placement to another, read off the two.

| from -> to | collective |
|---|---|
| P -> R | AllReduce |
| P -> S | ReduceScatter |
| S -> R | AllGather |
| S(i) -> S(j) | AllToAll |
| R -> S | Shard: a local slice |

Where a dim changes its cut, the way leads over R. Segments that several ranks hold are sent to each of them.
"""

from __future__ import annotations

from typing import Any

from onnxmesh.compiler.cost import exchanged
from onnxmesh.compiler.errors import CompilerDefect
from onnxmesh.compiler.ops.collectives import pack
from onnxmesh.runtime.placement import Partial, Placement, R, Replicate, Shard

Step = tuple[str, dict[str, Any], Placement]
"""(collective, its attributes, the placement after it)."""


def steps(before: Placement, after: Placement) -> list[Step]:
    """The collectives from `before` to `after`.

    Raises:
        CompilerDefect: there is no way (nothing leads to Partial).
    """
    if before == after:
        return []
    if isinstance(after, Partial):
        raise CompilerDefect(f"no collective leads from {before} to {after}")
    if isinstance(before, Replicate):
        assert isinstance(after, Shard)
        return [("Shard", _cut(after), after)]
    if isinstance(before, Partial):
        if isinstance(after, Shard) and before.op == "sum":
            return [("ReduceScatter", {"reduce": before.op, **_cut(after)}, after)]
        return [("AllReduce", {"reduce": before.op}, R), *steps(R, after)]
    if isinstance(after, Shard) and exchanged(before, after):
        attrs = {
            "split_dim": after.dim,
            "split_segments": pack(after.segments),
            "concat_dim": before.dim,
            "concat_segments": pack(before.segments),
        }
        return [("AllToAll", attrs, after)]
    return [("AllGather", _cut(before), R), *steps(R, after)]


def _cut(placement: Shard) -> dict[str, Any]:
    return {"dim": placement.dim, "segments": pack(placement.segments)}
