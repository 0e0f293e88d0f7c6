"""The walk from a Softmax to the contraction before it and to the one behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnxmesh.passes.graph.match import (
    Miss,
    before_cast,
    describe,
    given,
    ints,
    is_constant,
    label,
    last_axis,
    producer,
    scalar,
    scaled,
    shape_of,
    users,
)
from onnxmesh.passes.recognise.contraction import Contraction, contraction
from onnxmesh.passes.recognise.layout import permutation
from onnxmesh.passes.recognise.mask_conditions import Condition
from onnxmesh.passes.recognise.mask_positions import HIDES
from onnxmesh.passes.recognise.masks import Term
from onnxmesh.passes.recognise.softmax import unshifted

DEPTH = 24
"""Ops between a Softmax and a contraction, at most."""

NEAR = 4
"""Ops of any kind around a Softmax among which a contraction speaks for attention."""

Path = list[tuple[ir.Node, int]]
"""Nodes on the way, each with the input that carries the scores."""


@dataclass(slots=True)
class Scores:
    """What happens between the first contraction and the softmax: scale, soft cap (0: none), masks.

    `factors` are Mul and Div by numbers that differ from head to head or from query to query. `floor` says that
    scores below the lowest finite number are raised to it. `sink` is a score that stands beside those of the keys and
    takes its share of the weight, without a value of its own.
    """

    source: Contraction
    batch: tuple[int, ...]
    scale: float = 1.0
    cap: float = 0.0
    factors: list[tuple[str, ir.Value, tuple[int, ...]]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    floor: bool = False
    sink: ir.Value | None = None

    @property
    def key(self) -> int:
        """The operand of the contraction that the keys are."""
        return 0 if self.source.out[-1] in self.source.labels[0] else 1


@dataclass(frozen=True, slots=True)
class Weights:
    """What happens between the softmax and the second contraction, whose operand `index` the weights are.

    `hidden` is the condition of a selection that gives the other weights zero; `dropped` says that the last weight
    goes to no value.
    """

    target: Contraction
    index: int
    batch: tuple[int, ...]
    swapped: bool = False
    guarded: bool = False
    hidden: Condition | None = None
    dropped: bool = False


# --- before the softmax -------------------------------------------------------------------------------------


def find_scores(softmax: ir.Node) -> Scores:
    """What leads from a contraction to the softmax.

    Raises:
        Miss: nothing does, or not in a way that Attention has.
    """
    start, sink = _beside_sink(unshifted(given(softmax, 0), (len(shape_of(softmax.outputs[0])) - 1,)))
    source, path = _path(start, DEPTH, set())
    if not last_axis(softmax, default=-1):
        raise Miss("the softmax is not over the last axis", code="OM3102")
    keys, queries = source.out[-1:], source.out[-2:-1]
    owners = [[keys in labels, queries in labels] for labels in source.labels]
    if sorted(owners) != [[False, True], [True, False]] or len(source.summed) != 1:
        raise Miss(f"the scores of {label(source.node)} are not batch, queries and keys ({source.out})", code="OM3101")
    scores = Scores(source, shape_of(source.node.outputs[0])[:-2], sink=sink)
    for node, index in path:
        _pass(scores, node, index)
    if scores.cap:
        scores.scale *= scores.cap
    return scores


def _beside_sink(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The scores of the keys, and the one score that is joined to them, if there is one."""
    node = producer(before_cast(value), "Concat")
    if node is None or len(node.inputs) != 2 or not last_axis(node) or shape_of(node.inputs[1])[-1] != 1:
        return value, None
    return given(node, 0), given(node, 1)


def _path(value: ir.Value, depth: int, seen: set[ir.Value]) -> tuple[Contraction, Path]:
    """The nearest contraction that the scores come from, and the nodes behind it, in order."""
    node = producer(value)
    found = contraction(node)
    if found is not None:
        return found, []
    ways: list[tuple[Contraction, Path]] = []
    reason = Miss(f"no MatMul before the softmax: the scores come from {describe(value)}", code="OM3101")
    for index in _carriers(node) if node is not None and depth else ():
        assert node is not None
        before = given(node, index)
        if before in seen:
            continue
        seen.add(before)
        try:
            source, path = _path(before, depth - 1, seen)
        except Miss as miss:
            reason = miss
        else:
            ways.append((source, [*path, (node, index)]))
    if not ways:
        raise reason
    return min(ways, key=lambda way: len(way[1]))


def _carriers(node: ir.Node) -> Sequence[int]:
    """The inputs of a node between contraction and softmax that may carry the scores."""
    shape = shape_of(node.outputs[0])
    match node.op_type:
        case "Cast" | "Identity" | "Reshape" | "Tanh" | "Sub" | "Neg":
            return [0]
        case "Mul" | "Div":
            found = scaled(node)
            if found is not None:
                return [list(node.inputs).index(found[0])]
            sides = (0, 1) if node.op_type == "Mul" else (0,)
            return [i for i in sides if shape_of(node.inputs[1 - i])[-1:] in ((), (1,))]
        case "Add":
            return [i for i in (0, 1) if shape_of(node.inputs[i]) == shape]
        case "Where":
            return [i for i in (1, 2) if scalar(node.inputs[3 - i]) is not None]
        case "Max" if len(node.inputs) == 2:
            return [i for i in (0, 1) if scalar(node.inputs[1 - i]) is not None]
    return []


def _pass(scores: Scores, node: ir.Node, index: int) -> None:
    """Record what one node does to the scores."""
    before, after = shape_of(node.inputs[index]), shape_of(node.outputs[0])
    if node.op_type == "Reshape":
        if before[-2:] != after[-2:]:
            raise Miss(f"{label(node)} reshapes queries or keys", code="OM3101")
        scores.batch = after[:-2]
        return
    if before != after:
        raise Miss(f"the scores broadcast in {label(node)}", code="OM3101")
    match node.op_type:
        case "Mul" | "Div" | "Neg":
            found = scaled(node)
            if found is not None:
                _scale(scores, found[1], node)
            elif scores.terms or scores.cap:
                raise Miss(f"{label(node)} multiplies capped or masked scores by more than one number", code="OM3104")
            else:
                scores.factors.append((node.op_type, given(node, 1 - index), scores.batch))
        case "Tanh":
            if scores.terms or scores.cap:
                raise Miss(f"{label(node)} is not a soft cap: masks or another cap come before it", code="OM3104")
            scores.cap = 1.0
        case "Add" | "Sub":
            sign = 1.0 if node.op_type == "Add" else -1.0
            scores.terms.append(Term(scores.batch, given(node, 1 - index), sign))
        case "Where":
            fill = _hiding(node, 3 - index)
            seen = Condition(given(node, 0), negated=index == 2)
            scores.terms.append(Term(scores.batch, seen=seen, fill=fill))
        case "Max":
            _hiding(node, 1 - index)
            scores.floor = True


def _hiding(node: ir.Node, index: int) -> float:
    """The constant that takes the place of a score, which must be low enough to hide the key."""
    number = scalar(node.inputs[index])
    assert number is not None
    if number > HIDES:
        raise Miss(f"{label(node)} puts {number:g} in the place of scores: not low enough to hide a key", code="OM3103")
    return number


def _scale(scores: Scores, factor: float, node: ir.Node) -> None:
    if scores.cap:
        scores.cap *= factor
    else:
        scores.scale *= factor
    if not scores.terms:
        return
    if factor <= 0 or any(t.seen is not None and t.fill * factor > HIDES for t in scores.terms):
        raise Miss(f"{label(node)} multiplies masked scores by {factor:g}", code="OM3104")
    scores.terms = [replace(t, factor=t.factor * factor, fill=t.fill * factor) for t in scores.terms]


# --- behind the softmax -------------------------------------------------------------------------------------


def find_weights(softmax: ir.Node) -> Weights:
    """What leads from the softmax to a contraction with the values.

    Raises:
        Miss: nothing does, or not in a way that Attention has.
    """
    value = softmax.outputs[0]
    start = Weights(Contraction(softmax, (value, value), ("", ""), ""), 0, shape_of(value)[:-2])
    return _weights(value, start, DEPTH)


def _weights(value: ir.Value, so_far: Weights, depth: int) -> Weights:
    for node in users(value, "MatMul", "Einsum"):
        target = contraction(node)
        if target is not None:
            return replace(so_far, target=target, index=0 if target.operands[0] is value else 1)
    reason: Miss | None = None
    for node in users(value) if depth else ():
        following = _after(node, value, so_far)
        if following is None:
            continue
        try:
            return _weights(node.outputs[0], following, depth - 1)
        except Miss as miss:
            reason = reason or miss
    ops = sorted({n.op_type for n in users(value)}) or ["an output"]
    raise reason or Miss(f"MatMul missing on the value side: the weights go to {', '.join(ops)}", code="OM3105")


def _after(node: ir.Node, value: ir.Value, so_far: Weights) -> Weights | None:
    """The state behind one node that may stand between softmax and contraction."""
    match node.op_type:
        case "Cast" | "Identity":
            return so_far
        case "Reshape":
            shape = shape_of(node.outputs[0])
            return replace(so_far, batch=shape[:-2]) if shape[-2:] == shape_of(value)[-2:] else None
        case "Transpose":
            perm = permutation(node)
            n = len(perm)
            swap = (*range(n - 2), n - 1, n - 2)
            return replace(so_far, swapped=not so_far.swapped) if perm == swap else None
        case "Where":
            return _selected(node, value, so_far)
        case "Slice":
            return replace(so_far, dropped=True) if _drops_last(node) and not so_far.dropped else None
    return None


def _drops_last(node: ir.Node) -> bool:
    """Whether a Slice leaves out the last element of the last dim, and nothing else."""
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    first = ints(node, "starts") == (0,) and ints(node, "steps") == (1,)
    return first and after == (*before[:-1], before[-1] - 1)


def _selected(node: ir.Node, value: ir.Value, so_far: Weights) -> Weights | None:
    """A guard against NaN, or a mask that gives hidden keys no weight."""
    condition, first, second = given(node, 0), given(node, 1), given(node, 2)
    nan = producer(condition, "IsNaN")
    if second is value and scalar(first) == 0:
        if nan is not None and nan.inputs[0] is value:
            return replace(so_far, guarded=True)
        return replace(so_far, hidden=Condition(condition, negated=True))
    if first is value and scalar(second) == 0 and condition is not value:
        return replace(so_far, hidden=Condition(condition))
    return None


# --- near misses --------------------------------------------------------------------------------------------


def between_contractions(softmax: ir.Node) -> bool:
    """Whether products of two computed values stand within a few nodes of both sides of the softmax."""
    before = [v for v in softmax.inputs if v is not None]
    return _reaches(before, backwards=True) and _reaches(list(softmax.outputs), backwards=False)


def _reaches(values: list[ir.Value], backwards: bool) -> bool:
    for _ in range(NEAR):
        nodes = [producer(v) for v in values] if backwards else [n for v in values for n in users(v)]
        found = [n for n in nodes if n is not None]
        for node in found:
            target = contraction(node)
            if target is not None and not any(is_constant(v) for v in target.operands):
                return True
        values = [v for n in found for v in (n.inputs if backwards else n.outputs) if v is not None]
    return False
