"""Rules: how an op's dimensions share factors, and the strategies that follow.

A rule says, for one node and one mesh axis, which placements of its inputs and outputs go together. Most ops
say it with labels, as an einsum does: dims with the same label are cut together, a label that only inputs carry
is reduced. Ops that move dims (Reshape, Concat, ...) say it with a function. Nothing else in the compiler knows
what an op means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from onnxmesh.runtime.comm import REDUCTIONS
from onnxmesh.runtime.placement import Partial, Placement, R, Segments, Shard

Shape = tuple[int, ...]
Labels = tuple[str | None, ...]


@dataclass(frozen=True)
class OpView:
    """What a rule may know of a node: no names, no values.

    Attributes:
        ins: input shapes; None for an absent optional input.
        constant: which inputs are constants.
        fixed: which inputs are constants or made of constants alone, as a dequantised weight is.
        ranks: size of the mesh axis in question.
    """

    op: str
    ins: tuple[Shape | None, ...]
    outs: tuple[Shape, ...]
    in_dtypes: tuple[str, ...]
    out_dtypes: tuple[str, ...]
    constant: tuple[bool, ...]
    attrs: tuple[tuple[str, Any], ...]
    ranks: int
    fixed: tuple[bool, ...] = ()

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return self._attrs.get(name, default)

    @cached_property
    def _attrs(self) -> dict[str, Any]:
        return dict(self.attrs)

    @cached_property
    def _hash(self) -> int:
        return hash((self.op, self.ins, self.outs, self.attrs, self.constant, self.ranks, self.in_dtypes))

    def __hash__(self) -> int:
        return self._hash


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype given by name."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def is_reduced(dtype: str, reduction: str) -> bool:
    """Whether ranks can reduce values of this dtype."""
    return reduction in REDUCTIONS.get(dtype, ())


@dataclass(frozen=True, order=True)
class Port:
    """One end of a node: an input or an output, by position."""

    is_output: bool
    index: int


@dataclass(frozen=True)
class Strategy:
    """One way to run a node on an axis: a placement for every input and output.

    `expand` names the expansion (passes/partition/expand.py) that makes the local computation where the op itself, run
    on local shapes, is not it.
    """

    factor: str
    ins: tuple[Placement, ...]
    outs: tuple[Placement, ...]
    expand: str = ""

    def at(self, port: Port) -> Placement:
        """The placement at a port."""
        return self.outs[port.index] if port.is_output else self.ins[port.index]

    @property
    def key(self) -> tuple[Any, ...]:
        """A canonical sort key."""
        return (self.factor, self.expand, tuple(map(str, self.ins)), tuple(map(str, self.outs)))


@dataclass(frozen=True)
class Factors:
    """A rule by labels.

    Attributes:
        ins, outs: a label for every dim; None where the dim must be whole. A size-1 dim that broadcasts is None.
        sums: labels that inputs alone carry and the op reduces: label -> the reduction of the Partial result.
        linear: sets of inputs which, all Partial(sum) at once, give Partial(sum) outputs.
        expand: label -> the expansion that a strategy on it needs.
        single: labels whose parts must be on one rank only, since a statistic counts them.
        added: inputs that are added to a sum, as a bias is: Partial where the sum is.
    """

    ins: tuple[Labels, ...]
    outs: tuple[Labels, ...]
    sums: tuple[tuple[str, str], ...] = ()
    linear: tuple[frozenset[int], ...] = ()
    expand: tuple[tuple[str, str], ...] = ()
    single: tuple[str, ...] = ()
    added: frozenset[int] = frozenset()

    def strategies(self, view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
        """The strategies in which `port` has `placement`."""
        if isinstance(placement, Partial):
            yield from self._partial(view, port, placement)
        elif isinstance(placement, Shard):
            labels = (self.outs if port.is_output else self.ins)[port.index]
            label = labels[placement.dim]
            if label is not None:
                strategy = self.cut(view, label, placement.segments)
                if strategy is not None:
                    yield strategy

    def cut(self, view: OpView, label: str, segments: Segments) -> Strategy | None:
        """The strategy that cuts one label, or None where it cannot be."""
        reduction = dict(self.sums).get(label)
        if label in self.single and any(s.copies > 1 for s in segments):
            return None
        if reduction and not all(is_reduced(dtype, reduction) for dtype in view.out_dtypes):
            return None
        once = reduction == "sum" and any(s.copies > 1 for s in segments)
        if once and not any(c and label in labels for c, labels in zip(view.constant, self.ins)):
            return None  # a segment that several ranks hold would count more than once
        ins: tuple[Placement, ...] = tuple(
            Partial(reduction) if reduction and i in self.added else _place(labels, label, segments, shape, once and c)
            for i, (labels, shape, c) in enumerate(zip(self.ins, view.ins, view.constant))
        )
        if reduction:
            outs: tuple[Placement, ...] = tuple(Partial(reduction) for _ in self.outs)
        else:
            outs = tuple(_place(labels, label, segments, shape) for labels, shape in zip(self.outs, view.outs))
        placed = [p for p in ins + outs if isinstance(p, Shard)]
        if not all(p.fits(view.ranks) for p in placed):
            return None
        return Strategy(label, ins, outs, dict(self.expand).get(label, ""))

    def _partial(self, view: OpView, port: Port, placement: Partial) -> Iterable[Strategy]:
        if placement.op != "sum":
            return
        for inputs in self.linear:
            if port.is_output or port.index in inputs:
                ins = tuple(Partial() if i in inputs else R for i in range(len(view.ins)))
                yield Strategy("partial", ins, tuple(Partial() for _ in view.outs))


def _place(labels: Labels, label: str, segments: Segments, shape: Shape | None, once: bool = False) -> Placement:
    if shape is None or label not in labels:
        return R
    return Shard(labels.index(label), segments, once)


FactorRule = Callable[[OpView], Factors | None]
PortRule = Callable[[OpView, Port, Placement], Iterable[Strategy]]
Seen = Callable[[Port], Iterable[Placement]]
"""The placements that a port of this node is known to have in some strategy."""
PairRule = Callable[[OpView, Port, Placement, Seen], Iterable[Strategy]]
Localise = Callable[[OpView, Strategy], dict[str, Any]]
Flops = Callable[[OpView], float]


@dataclass(frozen=True)
class Rule:
    """All that the compiler knows about an op.

    Attributes:
        factors: labels, for ops that have them.
        ports: a function, for ops that move dims; asked besides `factors`.
        pairs: a function that may also ask what the other ports can have, where one port alone does not tell.
        localise: attributes that differ in the local view.
        flops: floating-point operations of the node as a whole; 0 for ops bound by memory.
        moves: false for ops that only rename bytes (views): they cost nothing.
        samples: (signature, attributes) of nodes that the rule is proven with, as in compiler/ops/samples.py.
    """

    op: str
    factors: FactorRule | None = None
    ports: PortRule | None = None
    pairs: PairRule | None = None
    localise: Localise | None = None
    flops: Flops | None = None
    moves: bool = True
    samples: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def strategies(
        self, view: OpView, port: Port, placement: Placement, seen: Seen | None = None
    ) -> Iterable[Strategy]:
        """The strategies in which `port` has `placement`; `placement` must fit the axis."""
        if self.factors is not None:
            factors = self.factors(view)
            if factors is not None:
                yield from factors.strategies(view, port, placement)
        if self.ports is not None:
            yield from self.ports(view, port, placement)
        if self.pairs is not None and seen is not None:
            yield from self.pairs(view, port, placement, seen)


_RULES: dict[str, Rule] = {}


def register(*ops: str, **fields: Any) -> None:
    """Register one rule for several ops."""
    for op in ops:
        if op in _RULES:
            raise ValueError(f"two rules for {op}")
        _RULES[op] = Rule(op, **fields)


def find(op: str) -> Rule | None:
    """The rule of an op, or None: then the node runs replicated."""
    return _RULES.get(op)


def names() -> frozenset[str]:
    """Every op that has a rule."""
    return frozenset(_RULES)


def replicate(view: OpView) -> Strategy:
    """The strategy that every node has: every rank computes all of it."""
    return Strategy("replicate", tuple(R for _ in view.ins), tuple(R for _ in view.outs))


def broadcast(shapes: Sequence[Shape | None], out: Shape) -> tuple[Labels, ...]:
    """Labels of inputs that broadcast to `out` (labels "0", "1", ... from the left of `out`)."""
    result: list[Labels] = []
    for shape in shapes:
        if shape is None:
            result.append(())
            continue
        skip = len(out) - len(shape)
        result.append(
            tuple(str(i + skip) if size == out[i + skip] and size > 1 else None for i, size in enumerate(shape))
        )
    return tuple(result)


def numbered(shape: Shape) -> Labels:
    """Labels "0", "1", ... for the dims that can be cut."""
    return tuple(str(i) if size > 1 else None for i, size in enumerate(shape))
