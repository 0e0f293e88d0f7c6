"""What the role of an axis demands: constraints on the choice, never the choice itself.

- `tp` shards every contraction weight and every looked-up table that it can.
- `cp` keeps weights whole, keeps every node of a sequence's stream in it, and pins self-attention. The queries of
  every attention are a sequence: a model of several stages has several.
- `dp` keeps weights whole and every node of the batch's stream in it.

A *stream* is what one dim of an activation becomes along the graph: all (edge, placement) pairs that strategies
link with the cut of that dim. Costs choose among what a role leaves; a constraint that cannot be met is dropped for
that class of nodes, with the reason recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxmesh.compiler.ir.rule import OpView, Port, Strategy
from onnxmesh.compiler.options import CpStrategy
from onnxmesh.compiler.reason import Reason
from onnxmesh.passes.place.candidates import Space
from onnxmesh.passes.place.tie import NodeClass
from onnxmesh.runtime.placement import Placement, Replicate, Shard

CONTRACTIONS = ("MatMul", "Einsum", "Conv", "ConvTranspose", "DeformConv", "MatMulInteger", "ConvInteger", "Experts")
EXPERT_WEIGHTS = (2, 3, 4)
ATTENTION = ("Attention", "AttentionBlock")
RECURRENT = ("RNN", "GRU", "LSTM")
_FACTOR_OF: dict[CpStrategy, tuple[str, ...]] = {
    "allgather": ("s",),
    "ulysses": ("h",),
    "ring": ("t",),
    "auto": ("s", "h", "t"),
}

WORST_SHARE = 2.0
"""Cuts that leave a rank more than this many times the least share of a weight do not count as sharding it.

Nor do those that leave it more than half of what could be spared: on two ranks twice the least share is the whole.
"""

_DECODING: dict[CpStrategy, tuple[str, ...]] = {"allgather": (), "ulysses": ("h",), "ring": (), "auto": ("kv",)}
"""With fewer new tokens than ranks there are no rows of q to share: the keys are, or the heads."""

Marked = set[tuple[int, Placement]]


@dataclass
class Allowed:
    """What the role leaves: strategies by class, and what it could not have."""

    strategies: list[list[Strategy]]
    self_attention: set[int] = field(default_factory=set)
    notes: dict[int, str] = field(default_factory=dict)


Pin = Callable[[Space, Allowed], None]
"""A constraint of the user's: it removes strategies."""


def weight_ports(view: OpView) -> list[int]:
    """The inputs that are weights: constants that a contraction sums over, and tables that are looked up.

    What is made of constants alone is one too: a weight that is dequantised before it is used.
    """
    if view.op == "Gather":
        big = view.fixed[0] and len(view.ins[0] or ()) > 1 and not view.fixed[1]
        return [0] if big and ("float" in view.in_dtypes[0] or view.in_dtypes[0] in ("int8", "uint8")) else []
    if view.op not in CONTRACTIONS:
        return []
    ports = EXPERT_WEIGHTS if view.op == "Experts" else (0, 1)
    return [i for i in ports if view.fixed[i : i + 1] == (True,) and _contracted(view, i) > 1]


def _contracted(view: OpView, port: int) -> int:
    """Size of what is summed over."""
    shape = view.ins[port] or ()
    if view.op in ("MatMul", "MatMulInteger"):
        return shape[-1] if port == 0 or len(shape) == 1 else shape[-2]
    if view.op == "Einsum":
        return max(shape, default=1)
    size = 1
    for dim in shape[1:]:
        size *= dim
    return size


def constrain(space: Space, role: str, cp_strategy: CpStrategy, pins: Iterable[Pin] = ()) -> Allowed:
    """The strategies that an axis of `role` allows."""
    allowed = {"tp": _tensor, "cp": _context, "dp": _data}[role](space, cp_strategy)
    for pin in pins:
        pin(space, allowed)
    return allowed


def _tensor(space: Space, _: CpStrategy) -> Allowed:
    result = Allowed([])
    for cls, strategies in zip(space.quotient.classes, space.strategies):
        kept = [s for s in strategies if s.expand not in ("ring", "split_kv")]
        shares = {s: _share(cls.view, s) for s in kept}
        least = min(shares.values())
        if least < 1.0:
            most = min(WORST_SHARE * least, (1.0 + least) / 2)
            kept = [s for s in kept if shares[s] <= max(least, most)]
        elif weight_ports(cls.view):
            result.notes[cls.index] = Reason("no dim of the weight can be cut on this axis", "OM2101")
        result.strategies.append(kept)
    return result


def _share(view: OpView, strategy: Strategy) -> float:
    """The part of its weights that one rank holds, the largest of them."""
    shares = [0.0]
    for i in weight_ports(view):
        placement = strategy.ins[i]
        shares.append(placement.local(view.ranks) / placement.size if isinstance(placement, Shard) else 1.0)
    return max(shares)


def _keeps_weights(view: OpView, strategy: Strategy) -> bool:
    """Whether no weight is cut, but for the batch dims of a MatMul: there every rank needs only its own."""
    placements = [strategy.ins[i] for i in weight_ports(view)]
    batched = view.op in ("MatMul", "MatMulInteger") and strategy.factor not in ("m", "n", "k")
    return all(isinstance(p, Replicate) for p in placements) or batched


def _context(space: Space, cp_strategy: CpStrategy) -> Allowed:
    attentions = [c for c in space.quotient.classes if c.view.op in ATTENTION]
    chosen = {c.index for c in attentions if _is_self_attention(space, c)}
    decoding = {c.index for c in attentions if c.view.ins[0][2] < space.quotient.ranks}  # type: ignore[index]
    stream = _stream(space, _seeds(space, {c.index for c in attentions} - decoding, dim=2), ("s", "t"))
    result = _in_stream(space, stream, ("b",))
    result.self_attention = chosen | decoding
    for cls in attentions:  # the keys of a cross-attention are few: they are gathered, not sent round
        strategies = result.strategies[cls.index]
        result.strategies[cls.index] = [s for s in strategies if s.factor != "t"] or strategies
    for index in sorted(result.self_attention):
        factors = _FACTOR_OF[cp_strategy] if index not in decoding else _DECODING[cp_strategy]
        kept = [s for s in space.strategies[index] if s.factor in factors]
        if kept:
            result.strategies[index] = kept
        else:
            words = f"self-attention cannot run as {cp_strategy}: no cut of it fits this axis"
            result.notes[index] = Reason(words, "OM2102")
    return result


def _data(space: Space, _: CpStrategy) -> Allowed:
    attentions = {c.index for c in space.quotient.classes if c.view.op in ATTENTION}
    seeds = _seeds(space, attentions, dim=0) or _recurrent_seeds(space) or _input_seeds(space)
    return _in_stream(space, _stream(space, seeds, ("b",)), ("h", "s", "t", "kv"))


def _in_stream(space: Space, stream: Marked, barred: tuple[str, ...]) -> Allowed:
    """Weights whole; nodes that can run in the stream do not run replicated; attention not by a barred factor."""
    result = Allowed([])
    for cls, strategies in zip(space.quotient.classes, space.strategies):
        kept = [s for s in strategies if _keeps_weights(cls.view, s)]
        if cls.view.op in ATTENTION:
            kept = [s for s in kept if s.factor not in barred]
        ours = [s for s in kept if _touches(space, cls, s, stream)]
        if ours and weight_ports(cls.view):
            kept = ours
        elif ours:
            kept = [s for s in kept if s.factor != "replicate"]
        result.strategies.append(kept)
    return result


def _touches(space: Space, cls: NodeClass, strategy: Strategy, stream: Marked) -> bool:
    return any(
        (edge, strategy.at(port)) in stream
        for port, edges in cls.edges.items()
        for edge in edges
        if isinstance(strategy.at(port), Shard)
    )


def _seeds(space: Space, attentions: set[int], dim: int) -> Marked:
    """The cuts of one dim of q."""
    return {
        (edge, placement)
        for index in attentions
        for edge in space.quotient.classes[index].edges[Port(False, 0)]
        for placement in space.placements[edge]
        if isinstance(placement, Shard) and placement.dim == dim
    }


def _recurrent_seeds(space: Space) -> Marked:
    """The cuts of what recurrent layers read: all that they let be cut is the batch, which may stand second."""
    return {
        (edge, strategy.ins[0])
        for cls in space.quotient.classes
        if cls.view.op in RECURRENT
        for strategy in space.strategies[cls.index]
        if isinstance(strategy.ins[0], Shard)
        for edge in cls.edges[Port(False, 0)]
    }


def _input_seeds(space: Space) -> Marked:
    """The cuts of dim 0 of the graph's inputs: the batch, where nothing else says what that is."""
    return {
        (edge.index, placement)
        for edge in space.quotient.edges
        if edge.producer is None and len(edge.shape) > 1
        for placement in space.placements[edge.index]
        if isinstance(placement, Shard) and placement.dim == 0
    }


def _stream(space: Space, seeds: Marked, factors: tuple[str, ...]) -> Marked:
    """Everything that strategies link with the seeds; through attention only by `factors`."""
    quotient = space.quotient
    marked = set(seeds)
    queue = deque(sorted(seeds, key=str))
    while queue:
        edge, placement = queue.popleft()
        for owner, port in quotient.edges[edge].ports:
            cls = quotient.classes[owner]
            for strategy in space.strategies[owner]:
                if strategy.at(port) != placement or not _keeps_weights(cls.view, strategy):
                    continue
                if cls.view.op in ATTENTION and strategy.factor not in factors:
                    continue
                for other, edges in cls.edges.items():
                    if isinstance(strategy.at(other), Shard):
                        fresh = {(e, strategy.at(other)) for e in edges} - marked
                        marked |= fresh
                        queue.extend(sorted(fresh, key=str))
    return marked


def _is_self_attention(space: Space, cls: NodeClass) -> bool:
    """Whether q and k descend from one activation along the sequence. Equal lengths prove nothing."""
    node = cls.nodes[0]
    query, key = node.inputs[0], node.inputs[1]
    assert query is not None and key is not None
    ours = _ancestors(space, query, lambda p: isinstance(p, Shard) and p.dim == 2)
    theirs = _ancestors(space, key, lambda p: isinstance(p, Shard) and p.dim == 2)
    return bool(ours & theirs)


def _ancestors(space: Space, value: ir.Value, wanted: Callable[[Placement], bool]) -> set[ir.Value]:
    """The values from which `value` takes the dim in question, back through the real graph."""
    quotient = space.quotient
    start = [(value, s) for s in _cuts(space, value) if wanted(s)]
    seen = set(start)
    queue = deque(start)
    while queue:
        current, placement = queue.popleft()
        producer = current.producer()
        if producer is None:
            continue
        owner = quotient.class_of[producer]
        view = quotient.classes[owner].view
        out = Port(True, current.index() or 0)
        for strategy in space.strategies[owner]:
            if strategy.at(out) != placement or not _keeps_weights(view, strategy):
                continue
            if view.op in ATTENTION and strategy.factor not in ("s", "t"):
                continue
            operands = producer.inputs[:1] if view.op in ("Rotary", *ATTENTION) else producer.inputs
            for source, cut in zip(operands, strategy.ins):
                if source is not None and isinstance(cut, Shard) and (source, cut) not in seen:
                    seen.add((source, cut))
                    queue.append((source, cut))
    return {current for current, _ in seen if _is_activation(current)}


def _cuts(space: Space, value: ir.Value) -> list[Placement]:
    producer = value.producer()
    if producer is None:
        for edge in space.quotient.edges:
            if edge.producer is None and value in edge.values:
                return list(space.placements[edge.index])
        return []
    out = Port(True, value.index() or 0)
    edges = space.quotient.classes[space.quotient.class_of[producer]].edges[out]
    return [p for edge in sorted(edges) for p in space.placements[edge]]


def _is_activation(value: ir.Value) -> bool:
    """Positions and masks are not activations: two sequences may share them."""
    return value.dtype is not None and value.dtype.is_floating_point() and not value.is_initializer()
