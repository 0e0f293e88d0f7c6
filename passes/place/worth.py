"""Whether an axis is worth its ranks: a compile that shards nothing fails instead of pretending."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.compiler.errors import ShardingError
from onnxmesh.compiler.options import CpStrategy
from onnxmesh.passes.place.place import Placed
from onnxmesh.passes.place.roles import ATTENTION, CONTRACTIONS, RECURRENT, weight_ports
from onnxmesh.runtime.placement import Shard


def check_worth(placed: Placed, cp_strategy: CpStrategy) -> None:
    """Raise ShardingError, saying why, if `tp` shards no weight, `cp` no attention or sequence, `dp` no batch."""
    reason = {"tp": _tensor, "cp": _context, "dp": _data}[placed.axis](placed, cp_strategy)
    if reason:
        raise ShardingError(
            f"nothing could be sharded on {placed.axis}={placed.ranks}: {reason}",
            hint="choose another number of ranks, or pass --allow-replicated to run it replicated",
            code={"tp": "OM2001", "cp": "OM2002", "dp": "OM2003"}[placed.axis],
        )


def _tensor(placed: Placed, _: CpStrategy) -> str:
    weighted = [(node, ports) for node, view in placed.views.items() if (ports := weight_ports(view))]
    if not weighted:
        return "the model has no weight that a MatMul, Gemm, Conv or lookup reads"
    sharded = any(isinstance(placed.strategies[node].ins[i], Shard) for node, ports in weighted for i in ports)
    return "" if sharded else f"none of its {len(weighted)} weights has a dim that {placed.ranks} ranks can share"


def _context(placed: Placed, cp_strategy: CpStrategy) -> str:
    attentions = [node for node, view in placed.views.items() if view.op in ATTENTION]
    if not attentions:
        return "no attention was found, so there is no sequence"
    shared = any(_is_sharded(placed, node) for node in attentions)
    if not placed.self_attention and not shared:
        return f"none of its {len(attentions)} attentions can be shared by {placed.ranks} ranks"
    if cp_strategy != "auto" and not placed.self_attention:
        return f"--cp-strategy {cp_strategy} speaks of self-attention, and the model has none"
    stuck = [node for node in placed.self_attention if not _is_sharded(placed, node)]
    elsewhere = shared if cp_strategy == "auto" else _only_short(placed, stuck, attentions)
    if stuck and len(stuck) == len(placed.self_attention) and not elsewhere:
        view = placed.views[stuck[0]]
        return f"self-attention on q {list(view.ins[0] or ())}, k {list(view.ins[1] or ())} has no cut as {cp_strategy}"
    return ""


def _only_short(placed: Placed, stuck: list[ir.Node], attentions: list[ir.Node]) -> bool:
    """Whether what has no cut has no rows for it either, as the last stage of a pyramid, while longer ones are cut."""
    long = {node for node in attentions if placed.views[node].ins[0][2] >= placed.ranks}  # type: ignore[index]
    return long.isdisjoint(stuck) and any(_is_sharded(placed, node) for node in long)


def _data(placed: Placed, _: CpStrategy) -> str:
    heavy = [node for node, view in placed.views.items() if view.op in (*CONTRACTIONS, *ATTENTION, *RECURRENT)]
    if any(_is_sharded(placed, node) for node in heavy or placed.views):
        return ""
    return "no batch dim is left that its ranks can share"


def _is_sharded(placed: Placed, node: ir.Node) -> bool:
    strategy = placed.strategies[node]
    return any(isinstance(p, Shard) for p in strategy.ins + strategy.outs)
