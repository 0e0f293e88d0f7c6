"""What hides a key from a query: masks that are added, selected or multiplied in, as inputs of one Attention.

A mask is a conjunction of *conditions*, each of them true where the key may be seen. A condition that says
`position of the key <= position of the query` becomes the inputs q_pos and k_pos; the others stay a boolean mask.
What is added and is no such condition stays additive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.match import (
    DOMAIN,
    Editor,
    Miss,
    array,
    given,
    is_constant,
    producer,
    scalar,
    shape_of,
)
from onnxmesh.passes.recognise_mask_positions import HIDES, seen_by

ABSORBS = -1e30
"""A number of at most this, added to a score in float32, leaves nothing of the score; the lowest one of float16
does not: in a row that sees no key the scores then still count."""

SMALL = 1 << 16
"""Constants of more bytes are not made: they are computed from those of the model."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The scores that masks meet: heads and sizes of the attention, and the batch dims at this point."""

    b: int
    h: int
    s: int
    t: int
    batch: tuple[int, ...] = ()

    def at(self, batch: tuple[int, ...]) -> Grid:
        """The same where the scores have these batch dims."""
        return replace(self, batch=batch)


@dataclass(frozen=True, slots=True)
class Condition:
    """A boolean value, true where a key may be seen; with `negated`, where it may not."""

    value: ir.Value
    negated: bool = False

    def __invert__(self) -> Condition:
        return Condition(self.value, not self.negated)


@dataclass(frozen=True, slots=True)
class Term:
    """One op on the scores: `value` is added (times `factor`), or `seen` selects between the score and `fill`."""

    batch: tuple[int, ...]
    value: ir.Value | None = None
    factor: float = 1.0
    seen: Condition | None = None
    fill: float = -math.inf


@dataclass(slots=True)
class Masks:
    """The inputs of an Attention that hide keys. `fill` is what hidden scores become, where all agree."""

    conditions: list[tuple[Condition, tuple[int, ...]]] = field(default_factory=list)
    fill: float | None = None
    added: ir.Value | None = None
    positions: tuple[ir.Value, ir.Value] | None = None
    mask: ir.Value | None = None


# --- conditions ---------------------------------------------------------------------------------------------


def conditions(seen: Condition) -> list[Condition]:
    """The conjunction as a list, without what is always true."""
    node = producer(seen.value)
    if node is not None:
        match node.op_type:
            case "Not":
                return conditions(Condition(given(node, 0), not seen.negated))
            case "And" | "Or" if (node.op_type == "Or") == seen.negated:
                return [c for i in (0, 1) for c in conditions(Condition(given(node, i), seen.negated))]
            case "Identity":
                return conditions(Condition(given(node, 0), seen.negated))
            case "Expand" | "Cast" if given(node, 0).dtype == ir.DataType.BOOL:
                return conditions(Condition(given(node, 0), seen.negated))
    truth = _seen(seen)
    if truth is not None and truth.size <= SMALL:
        return [] if truth.all() else [seen]
    known = seen_by(seen.value, seen.negated)
    return [] if known is not None and known.every else [seen]


def condition_of(value: ir.Value, grid: Grid, alone: bool) -> tuple[Condition, float] | None:
    """The condition and the fill that an additive mask stands for, where adding it is the same as selecting.

    `alone` says that nothing else hides keys.
    """
    found = _selected(value)
    if found is not None and found[1] <= ABSORBS:
        return found
    return _constant_condition(value, grid, alone)


def _selected(value: ir.Value) -> tuple[Condition, float] | None:
    """The condition and the number where `value` is zero or that number."""
    node = producer(value, "Expand", "Identity", "Cast", "Where")
    if node is None:
        return None
    if node.op_type != "Where":
        found = _selected(given(node, 0))
        return (found[0], _cast(found[1], value.dtype)) if found is not None else None
    numbers = scalar(node.inputs[1]), scalar(node.inputs[2])
    if numbers[0] == 0 and numbers[1] is not None:
        return Condition(given(node, 0)), numbers[1]
    if numbers[1] == 0 and numbers[0] is not None:
        return Condition(given(node, 0), negated=True), numbers[0]
    return None


def _cast(number: float, dtype: ir.DataType | None) -> float:
    assert dtype is not None
    with np.errstate(over="ignore"):
        return float(np.asarray(number).astype(dtype.numpy()))


def _constant_condition(value: ir.Value, grid: Grid, alone: bool) -> tuple[Condition, float] | None:
    """An additive mask of constants, of zeros and one number that hides. The condition holds the floats themselves:
    true where they are zero. What a hidden score becomes matters only in a row that sees nothing."""
    seen = seen_by(value) if value.dtype != ir.DataType.BOOL else None
    if seen is None or seen.every:
        return None
    if alone and shape_of(value)[-1] == grid.t and seen.some:
        return Condition(value), -math.inf
    return (Condition(value), seen.hides) if seen.hides <= ABSORBS else None


def _seen(condition: Condition) -> np.ndarray | None:
    """The truth of a constant condition."""
    data = array(condition.value)
    if data is None:
        return None
    return (data if data.dtype == bool else data == 0) != condition.negated


# --- causal conditions --------------------------------------------------------------------------------------


def causal(editor: Editor, condition: Condition, grid: Grid) -> tuple[ir.Value, ir.Value] | None:
    """(q_pos, k_pos) where the condition is `k_pos[j] <= q_pos[i]`: a constant triangle, or a comparison."""
    node = producer(condition.value, "LessOrEqual", "GreaterOrEqual", "Less", "Greater")
    found = _compared(editor, node, condition.negated, grid) if node is not None else None
    if found is not None:
        return found
    if shape_of(condition.value)[-2:] != (grid.s, grid.t):
        return None
    seen = seen_by(condition.value, condition.negated)
    positions = seen.positions if seen is not None else None
    if positions is None:
        return None
    return _constant(editor, positions[0], "q_pos"), _constant(editor, positions[1], "k_pos")


def _compared(editor: Editor, node: ir.Node, negated: bool, grid: Grid) -> tuple[ir.Value, ir.Value] | None:
    """`k <= q` (or `not k > q`, or `q >= k`, ..) for positions k along the last dim and q along the one before."""
    first, second = given(node, 0), given(node, 1)
    if first.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    less = node.op_type.startswith("Less") != negated
    strict = not node.op_type.endswith("OrEqual") if not negated else node.op_type.endswith("OrEqual")
    k, q = (first, second) if less else (second, first)
    if not _along(k, -1, grid.t) or not _along(q, -2, grid.s):
        return None
    if strict:
        if not is_constant(q):
            return None
        data = array(q)
        if data is None:
            return None
        return _constant(editor, data.reshape(-1) - 1, "q_pos"), _positions(editor, k, "k_pos")
    return _positions(editor, q, "q_pos"), _positions(editor, k, "k_pos")


def _along(value: ir.Value, axis: int, size: int) -> bool:
    """Whether the value varies along one dim only."""
    shape = shape_of(value)
    return len(shape) >= -axis and math.prod(shape) == shape[axis] == size


def _positions(editor: Editor, value: ir.Value, name: str) -> ir.Value:
    data = array(value)
    if data is not None:
        return _constant(editor, data.reshape(-1), name)
    if len(shape_of(value)) != 1:
        value = editor.op("Reshape", [value], (math.prod(shape_of(value)),), domain=DOMAIN)
    return editor.cast(value, ir.DataType.INT64)


def _constant(editor: Editor, data: np.ndarray, name: str) -> ir.Value:
    return editor.constant(data.astype(np.int64), name)


# --- putting them together ----------------------------------------------------------------------------------


def gather(editor: Editor, terms: Sequence[Term], grid: Grid) -> Masks:
    """The terms, in the order in which they meet the scores, as the inputs of one Attention."""
    masks = Masks()
    for term in terms:
        _take(editor, masks, term, grid.at(term.batch), alone=len(terms) == 1)
    kept = []
    for condition, batch in masks.conditions:
        if masks.positions is None and (masks.fill == -math.inf or masks.added is None):
            masks.positions = causal(editor, condition, grid)
            if masks.positions is not None:
                continue
        kept.append((condition, batch))
    masks.mask = _conjunction(editor, kept, grid)
    if masks.added is not None:
        masks.mask = _select(editor, masks.mask, masks.added, masks.fill)
    return masks


def _take(editor: Editor, masks: Masks, term: Term, grid: Grid, alone: bool) -> None:
    """Add one term to the masks."""
    seen, fill, value = term.seen, term.fill, term.value
    if value is not None and (term.factor == 1 or array(value) is None) and term.factor > 0:
        found = condition_of(value, grid, alone)
        if found is not None and (found[1] == -math.inf or (not masks.conditions and masks.added is None)):
            seen, fill, value = found[0], found[1] * term.factor, None
    if value is not None:
        if _nothing(value):
            return
        if masks.fill is not None and masks.fill != -math.inf:
            _settle(editor, masks, grid)
        bias = rank4(editor, value, grid)
        if term.factor != 1:
            bias = editor.times(bias, term.factor)
        masks.added = bias if masks.added is None else _sum(editor, masks.added, bias)
        return
    assert seen is not None
    if masks.conditions and masks.fill != fill:
        _settle(editor, masks, grid)
    found_conditions = [(c, grid.batch) for c in conditions(seen)]
    if masks.added is not None and fill != -math.inf:
        both = _conjunction(editor, found_conditions, grid)
        masks.added = _select(editor, both, masks.added, fill)
        return
    masks.conditions += [c for c in found_conditions if c not in masks.conditions]
    masks.fill = fill


def _nothing(value: ir.Value) -> bool:
    """Whether the value is zero everywhere: older exporters add such a one."""
    node = producer(value, "Expand", "Reshape", "Mul")
    if node is not None:
        return any(_nothing(v) for v in node.inputs if v is not None)
    data = array(value)
    return data is not None and not data.any()


def _settle(editor: Editor, masks: Masks, grid: Grid) -> None:
    """Turn the conditions so far into an additive mask, for what follows does not agree with them."""
    seen = _conjunction(editor, masks.conditions, grid)
    if seen is not None:
        zero = masks.added if masks.added is not None else editor.number(0.0, ir.DataType.FLOAT)
        masks.added = _select(editor, seen, zero, masks.fill)
    masks.conditions, masks.fill = [], None


def _conjunction(editor: Editor, found: Sequence[tuple[Condition, tuple[int, ...]]], grid: Grid) -> ir.Value | None:
    """The conditions as one boolean mask of rank 4."""
    result: ir.Value | None = None
    for condition, batch in found:
        value = rank4(editor, _boolean(editor, condition), grid.at(batch))
        if result is None:
            result = value
        else:
            shape = np.broadcast_shapes(shape_of(result), shape_of(value))
            result = editor.op("And", [result, value], shape)
    return result


def _boolean(editor: Editor, condition: Condition) -> ir.Value:
    value, negated = condition.value, condition.negated
    seen = _seen(condition)
    if seen is not None and seen.nbytes <= SMALL and (negated or value.dtype != ir.DataType.BOOL):
        return editor.constant(seen, "mask")
    if value.dtype != ir.DataType.BOOL:
        zero = editor.number(0.0, value.dtype)
        value = editor.op("Equal", [value, zero], shape_of(value), ir.DataType.BOOL)
    return editor.op("Not", [value], shape_of(value)) if negated else value


def _select(editor: Editor, seen: ir.Value | None, value: ir.Value, fill: float | None) -> ir.Value:
    if seen is None:
        return value
    assert fill is not None
    shape = np.broadcast_shapes(shape_of(seen), shape_of(value))
    hidden = editor.number(fill, value.dtype)
    return editor.op("Where", [seen, value, hidden], shape, value.dtype)


def _sum(editor: Editor, a: ir.Value, b: ir.Value) -> ir.Value:
    if a.dtype != b.dtype:
        a, b = editor.cast(a, ir.DataType.FLOAT), editor.cast(b, ir.DataType.FLOAT)
    return editor.op("Add", [a, b], np.broadcast_shapes(shape_of(a), shape_of(b)))


def rank4(editor: Editor, value: ir.Value, grid: Grid) -> ir.Value:
    """`value`, which broadcasts to scores with the batch dims of `grid`, broadcasting to `[b,h,s,t]`."""
    node = producer(value, "Expand")
    if node is not None:
        return rank4(editor, given(node, 0), grid)
    shape = shape_of(value)
    if len(shape) == 4 and grid.batch == (grid.b, grid.h):
        return value
    if len(shape) > len(grid.batch) + 2:
        raise Miss(f"the mask has rank {len(shape)}, the scores have rank {len(grid.batch) + 2}")
    padded = (1,) * (len(grid.batch) + 2 - len(shape)) + shape
    batch = grouped(padded[:-2], grid.batch, grid.b, grid.h)
    if batch is None or batch[0] not in (1, grid.b) or batch[1] not in (1, grid.h):
        padded = (*grid.batch, *padded[-2:])
        value = editor.op("Expand", [value], padded, domain=DOMAIN)
        batch = grouped(grid.batch, grid.batch, grid.b, grid.h)
    if batch is None:
        raise Miss(f"the mask of shape {list(shape)} does not fit {grid.b} x {grid.h} heads")
    return editor.op("Reshape", [value], (*batch, *padded[-2:]), domain=DOMAIN)


def grouped(dims: Sequence[int], full: Sequence[int], b: int, h: int) -> tuple[int, int] | None:
    """Batch dims that broadcast to `full`, which is b x h heads, as two dims that broadcast to (b, h)."""
    if math.prod(dims) == 1:
        return 1, 1
    for cut in range(len(full) + 1):
        if math.prod(full[:cut]) == b and math.prod(full[cut:]) == h:
            first, second = _merged(dims[:cut], full[:cut]), _merged(dims[cut:], full[cut:])
            if first is not None and second is not None:
                return first, second
    return (b, h) if tuple(dims) == tuple(full) else None


def _merged(dims: Sequence[int], full: Sequence[int]) -> int | None:
    """One dim for a group: its whole size, or the size of the leading dims where the rest broadcasts."""
    kept = list(dims)
    while kept and kept[-1] == 1:
        kept.pop()
    return math.prod(kept) if tuple(kept) == tuple(full[: len(kept)]) else None
