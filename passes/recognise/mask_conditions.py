"""Masks taken apart: a conjunction of conditions, each of them true where a key may be seen."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.match import Editor, array, given, is_constant, is_float, producer, scalar, shape_of
from onnxmesh.passes.recognise.mask_positions import seen_by
from onnxmesh.passes.recognise.mask_values import ELEMENTWISE

ABSORBS = -1e30
"""A number of at most this, added to a score in float32, leaves nothing of the score; the lowest one of float16
does not: in a row that sees no key the scores then still count."""

SMALL = 1 << 16
"""Constants of more bytes are not made: they are computed from those of the model."""

LARGEST = 2.0**64
"""No integer is larger."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A boolean value, true where a key may be seen, or another value, that is zero there; with `negated`, where it
    may not."""

    value: ir.Value
    negated: bool = False

    def __invert__(self) -> Condition:
        return Condition(self.value, not self.negated)

    @property
    def boolean(self) -> bool:
        """Whether the value is boolean."""
        return self.value.dtype == ir.DataType.BOOL

    def of(self, value: ir.Value, negated: bool = False) -> Condition:
        """The same of another value, or the contrary."""
        return Condition(value, self.negated != negated)


# --- a conjunction in its parts -----------------------------------------------------------------------------


def conditions(editor: Editor, seen: Condition) -> list[Condition]:
    """The conjunction as a list, without what is always true."""
    parts = _parts(editor, seen)
    if parts is not None:
        return list(dict.fromkeys(c for part in parts for c in conditions(editor, part)))
    truth = truth_of(seen)
    if truth is not None and truth.size <= SMALL:
        return [] if truth.all() else [seen]
    known = seen_by(seen.value, seen.negated)
    return [] if known is not None and known.every else [seen]


def _parts(editor: Editor, seen: Condition) -> list[Condition] | None:
    """What the condition is the conjunction of, one step back; None where there is no such step."""
    node = producer(seen.value)
    if node is None:
        return None
    inputs = [v for v in node.inputs if v is not None]
    if node.op_type in ("Identity", "Expand"):
        return [seen.of(inputs[0])]
    if node.op_type == "Reshape":
        return _reshaped(editor, seen, node)
    if not seen.boolean:
        return _parts_of_number(seen, node, inputs)
    match node.op_type:
        case "Not":
            return [seen.of(inputs[0], True)]
        case "And" | "Or" if (node.op_type == "Or") == seen.negated:
            return [seen.of(v) for v in inputs]
        case "Where":
            return _chosen(seen, inputs)
        case "Cast":
            number = seen.of(inputs[0], inputs[0].dtype != ir.DataType.BOOL)
            return [number] if number.boolean or _parts(editor, number) is not None else None
        case "Equal":
            for x, zero in (inputs, inputs[::-1]):
                if scalar(zero) == 0 and shape_of(x) == shape_of(seen.value):
                    return [seen.of(x)] if _parts(editor, seen.of(x)) is not None else _compared(editor, seen, node)
        case "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual":
            return _compared(editor, seen, node)
    return None


COMPARE = {
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
}


def _compared(editor: Editor, seen: Condition, node: ir.Node) -> list[Condition] | None:
    """A mask of zeros and one number, compared with a number, is where it is zero, or where it is not."""
    first, second = given(node, 0), given(node, 1)
    mask, left = (first, True) if scalar(second) is not None else (second, False)
    number = scalar(second if left else first)
    found = selection(editor, mask) if number is not None and is_float(mask) else None
    if number is None or found is None or shape_of(mask) != shape_of(seen.value):
        return None
    compare = COMPARE[node.op_type]
    zero, fill = (compare(x, number) if left else compare(number, x) for x in (0.0, found.fill))
    return list(found.conditions) if zero != seen.negated and zero != fill else None


def _parts_of_number(seen: Condition, node: ir.Node, inputs: Sequence[ir.Value]) -> list[Condition] | None:
    """A number is zero as the integer or the boolean is that it was cast from; a product of such, where one is."""
    if node.op_type == "Cast" and not is_float(inputs[0]):
        return [seen.of(inputs[0], inputs[0].dtype == ir.DataType.BOOL)]
    if node.op_type == "Mul" and seen.negated and all(_zero_or_one(v) for v in inputs):
        return [seen.of(v) for v in inputs]
    return None


def _zero_or_one(value: ir.Value) -> bool:
    """Whether the value was boolean, so that products of such are zero only where one of them is."""
    node = producer(value, "Cast", "Identity", "Expand", "Reshape", "Mul")
    if node is None:
        data = array(value)
        return value.dtype == ir.DataType.BOOL or (data is not None and bool(((data == 0) | (data == 1)).all()))
    return all(_zero_or_one(v) for v in node.inputs if v is not None)


def _chosen(seen: Condition, inputs: Sequence[ir.Value]) -> list[Condition] | None:
    """A selection among booleans, one of them constant, is an And or an Or."""
    test = Condition(inputs[0])
    for other, number, condition in ((inputs[1], inputs[2], test), (inputs[2], inputs[1], ~test)):
        if scalar(number) == seen.negated:
            return [condition, seen.of(other)]
    return None


def _reshaped(editor: Editor, seen: Condition, node: ir.Node) -> list[Condition] | None:
    """A conjunction before dims of size 1 come or go is one behind them."""
    inner, before, after = given(node, 0), shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if [n for n in before if n != 1] != [n for n in after if n != 1]:
        return None
    if producer(inner) is None or _parts(editor, seen.of(inner)) is None:
        return None
    found = conditions(editor, seen.of(inner))
    return [_lift(editor, c, before, after) for c in found]


def _lift(editor: Editor, condition: Condition, before: Sequence[int], after: Sequence[int]) -> Condition:
    """The condition, which broadcasts to `before`, so that it broadcasts to `after`."""
    return Condition(lifted(editor, condition.value, before, after), condition.negated)


def lifted(editor: Editor, value: ir.Value, before: Sequence[int], after: Sequence[int]) -> ir.Value:
    """A value that broadcasts to `before` in the shape that broadcasts to `after`, which has other dims of size 1."""
    shape = shape_of(value)
    padded = (1,) * (len(before) - len(shape)) + shape
    own = iter([n for n, whole in zip(padded, before) if whole != 1])
    return editor.reshape(value, [1 if whole == 1 else next(own) for whole in after])


def shrunk(editor: Editor, value: ir.Value) -> ir.Value:
    """A value that broadcasts to the same, computed before dims were expanded where that is cheaper."""
    node = producer(value)
    if node is None or len(node.outputs) > 1:
        return value
    if node.op_type in ("Expand", "Identity"):
        return shrunk(editor, given(node, 0))
    if node.op_type not in ELEMENTWISE or math.prod(shape_of(value)) <= SMALL:
        return value
    inputs = [shrunk(editor, v) for v in node.inputs if v is not None]
    shape = np.broadcast_shapes(*map(shape_of, inputs))
    if math.prod(shape) == math.prod(shape_of(value)):
        return value
    attrs = {name: a.value for name, a in node.attributes.items()}
    return editor.op(node.op_type, inputs, shape, value.dtype, attrs, node.domain)


def truth_of(condition: Condition) -> np.ndarray | None:
    """The truth of a constant condition."""
    data = array(condition.value)
    if data is None:
        return None
    return (data if data.dtype == bool else data == 0) != condition.negated


# --- conditions that are added ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selection:
    """Numbers that are zero where all conditions hold, and `fill` elsewhere."""

    conditions: tuple[Condition, ...]
    fill: float


def selection(editor: Editor, value: ir.Value) -> Selection | None:
    """The conditions and the number where `value` is zero or that number, which hides."""
    node = producer(value, "Expand", "Identity", "Cast", "Where", "Reshape")
    if node is None or value.dtype == ir.DataType.BOOL:
        return _constant(value)
    if node.op_type == "Where":
        return _where(editor, node) or _constant(value)
    inner = selection(editor, given(node, 0)) if is_float(node.inputs[0]) else None
    if inner is None:
        return _constant(value)
    found, before, after = inner.conditions, shape_of(node.inputs[0]), shape_of(value)
    if node.op_type == "Reshape":
        if [n for n in before if n != 1] != [n for n in after if n != 1]:
            return _constant(value)
        found = tuple(_lift(editor, c, before, after) for c in found)
    return Selection(found, _cast(inner.fill, value.dtype))


def _where(editor: Editor, node: ir.Node) -> Selection | None:
    """Zero, or a selection with the same number, where a condition holds, and the number elsewhere."""
    test = Condition(given(node, 0))
    for kept, hidden, condition in ((node.inputs[1], node.inputs[2], test), (node.inputs[2], node.inputs[1], ~test)):
        assert kept is not None and hidden is not None
        fill = number_of(hidden)
        if fill is None:
            continue
        if number_of(kept) == 0:
            return Selection((condition,), fill)
        inner = selection(editor, kept)
        if inner is not None and inner.fill == fill:
            return Selection((*inner.conditions, _where_zero(condition, kept)), fill)
    return None


def _where_zero(condition: Condition, value: ir.Value) -> Condition:
    """The condition where `value` is zero, as it does not matter elsewhere: `value + x == 0` is `x == 0`."""
    node = producer(condition.value, "Equal")
    if node is None or scalar(node.inputs[1]) != 0:
        return condition
    total = producer(node.inputs[0], "Add")
    for i in (0, 1) if total is not None else ():
        assert total is not None
        if _unexpanded(given(total, i)) is _unexpanded(value):
            return condition.of(given(total, 1 - i))
    return condition


def _unexpanded(value: ir.Value) -> ir.Value:
    node = producer(value, "Expand", "Identity")
    return _unexpanded(given(node, 0)) if node is not None else value


def number_of(value: ir.Value) -> float | None:
    """The number that all elements of a constant are, where it was expanded from one."""
    node = producer(value, "Expand", "Identity", "Cast", "Reshape")
    if node is None:
        return scalar(value)
    found = number_of(given(node, 0))
    return _cast(found, value.dtype) if found is not None else None


def _cast(number: float, dtype: ir.DataType | None) -> float:
    assert dtype is not None
    with np.errstate(over="ignore"):
        return float(np.asarray(number).astype(dtype.numpy()))


def _constant(value: ir.Value) -> Selection | None:
    """A mask computed from constants. The condition holds the numbers themselves: true where they are zero."""
    seen = seen_by(value) if is_float(value) else None
    if seen is None or seen.every or seen.hides is None:
        return None
    return Selection((Condition(value),), seen.hides)


# --- what is no condition -----------------------------------------------------------------------------------


def is_zero(value: ir.Value) -> bool:
    """Whether the value is zero everywhere: older exporters add such a one."""
    node = producer(value, "Expand", "Reshape", "Mul")
    if node is not None and any(is_zero(v) for v in node.inputs if v is not None):
        return True
    data = array(value)
    if data is not None:
        return not data.any()
    seen = seen_by(value) if is_float(value) else None
    return seen is not None and seen.every


def moderate(value: ir.Value) -> bool:
    """Whether the numbers are known to be small beside one that hides, so that a sum with it hides as well."""
    return _bound(value) < -ABSORBS


def _bound(value: ir.Value) -> float:
    """No element is larger than this, in absolute value; infinite where that is not known."""
    if is_constant(value):
        data = array(value)
        if data is None or data.size == 0:
            return math.inf
        largest = float(np.abs(data.astype(np.float64)).max())
        return largest if math.isfinite(largest) else math.inf
    if not is_float(value):
        return LARGEST
    node = producer(value)
    inputs = [v for v in node.inputs if v is not None] if node is not None else []
    match node.op_type if node is not None else "":
        case "Expand" | "Reshape" | "Transpose" | "Slice" | "Cast" | "Neg" | "Abs" | "Gather" | "Identity":
            return _bound(inputs[0])
        case "Mul":
            return _bound(inputs[0]) * _bound(inputs[1])
        case "Div":
            divisor = number_of(inputs[1])
            return _bound(inputs[0]) / abs(divisor) if divisor else math.inf
        case "Add" | "Sub":
            return _bound(inputs[0]) + _bound(inputs[1])
        case "Where":
            return max(_bound(inputs[1]), _bound(inputs[2]))
    return math.inf
