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

from onnxmesh.passes.graph.match import (
    DOMAIN,
    Editor,
    Miss,
    array,
    given,
    is_constant,
    producer,
    shape_of,
)
from onnxmesh.passes.recognise.mask_conditions import (
    ABSORBS,
    SMALL,
    Condition,
    conditions,
    is_zero,
    moderate,
    number_of,
    selection,
    shrunk,
    truth_of,
)
from onnxmesh.passes.recognise.mask_positions import HIDES, Seen, seen_by

LOWEST = float(np.finfo(np.float32).min)
"""What the score of a hidden key becomes in an Attention whose masked rows are uniform."""


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
class Term:
    """One op on the scores: `value` is added (times `factor`), or `seen` selects between the score and `fill`."""

    batch: tuple[int, ...]
    value: ir.Value | None = None
    factor: float = 1.0
    seen: Condition | None = None
    fill: float = -math.inf


@dataclass(slots=True)
class Masks:
    """The inputs of an Attention that hide keys. `fill` is what hidden scores become, where all agree; where what is
    added is `moderate`, it does not matter whether it is added before or after."""

    conditions: list[tuple[Condition, tuple[int, ...]]] = field(default_factory=list)
    fill: float | None = None
    added: ir.Value | None = None
    moderate: bool = True
    positions: tuple[ir.Value, ir.Value] | None = None
    mask: ir.Value | None = None


# --- causal conditions --------------------------------------------------------------------------------------


def causal(
    editor: Editor, condition: Condition, grid: Grid
) -> tuple[tuple[ir.Value, ir.Value] | None, list[Condition]]:
    """(q_pos, k_pos) where the condition is `k_pos[j] <= q_pos[i]`: a constant triangle, or a comparison; and what
    the condition says beside, where it is a band."""
    node = producer(condition.value, "LessOrEqual", "GreaterOrEqual", "Less", "Greater")
    found = _compared(editor, node, condition.negated, grid) if node is not None else None
    seen = _of_grid(condition, grid) if found is None else None
    if found is not None or seen is None:
        return found, []
    if seen.positions is not None:
        q, k = seen.positions
        return (_constant(editor, q, "q_pos"), _constant(editor, k, "k_pos")), []
    if seen.runs is None or _is_small(condition):
        return None, []
    first, end = seen.runs
    positions = _constant(editor, end - 1, "q_pos"), _constant(editor, np.arange(grid.t), "k_pos")
    return positions, [_from(editor, first, grid)]


def compared(
    editor: Editor, condition: Condition, grid: Grid, positions: tuple[ir.Value, ir.Value] | None
) -> list[Condition] | None:
    """A large constant condition that lets every query see a run of keys, as comparisons: of its first key, and of
    its end, where that does not follow from the positions."""
    seen = None if _is_small(condition) else _of_grid(condition, grid)
    if seen is None or seen.runs is None:
        return None
    first, end = seen.runs
    found = [_from(editor, first, grid)] if first.max() > 0 else []
    q, k = (array(p) for p in positions) if positions is not None else (None, None)
    follows = q is not None and k is not None and np.array_equal(k, np.arange(grid.t)) and bool((q < end).all())
    return found if follows or end.min() == grid.t else [*found, ~_from(editor, end, grid)]


def _of_grid(condition: Condition, grid: Grid) -> Seen | None:
    """What a constant condition that differs from query to query and from key to key lets see."""
    own = shape_of(condition.value)[-2:] == (grid.s, grid.t)
    return seen_by(condition.value, condition.negated) if own else None


def _is_small(condition: Condition) -> bool:
    return is_constant(condition.value) and math.prod(shape_of(condition.value)) <= SMALL


def _from(editor: Editor, first: np.ndarray, grid: Grid) -> Condition:
    """The keys from the first one on that each query sees, of rank 4."""
    rows = _constant(editor, first.reshape(1, 1, grid.s, 1), "first")
    keys = _constant(editor, np.arange(grid.t).reshape(1, 1, 1, grid.t), "k_pos")
    return Condition(editor.op("LessOrEqual", [rows, keys], (1, 1, grid.s, grid.t), ir.DataType.BOOL))


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
    terms = [part for term in terms for part in split(editor, term)]
    for term in terms:
        _take(editor, masks, term, grid.at(term.batch), alone=len(terms) == 1)
    chosen, masks.positions, rest = _choose(editor, masks, grid)
    kept: list[tuple[Condition, tuple[int, ...]]] = [(c, (grid.b, grid.h)) for c in rest]
    for condition, batch in masks.conditions:
        if condition != chosen:
            runs = compared(editor, condition, grid, masks.positions)
            kept += [(condition, batch)] if runs is None else [(c, (grid.b, grid.h)) for c in runs]
    masks.mask = _conjunction(editor, kept, grid)
    if masks.added is not None:
        both = masks.positions is not None and masks.fill != -math.inf
        masks.mask = _select(editor, masks.mask, masks.added, LOWEST if both else masks.fill)
    return masks


def _choose(
    editor: Editor, masks: Masks, grid: Grid
) -> tuple[Condition | None, tuple[ir.Value, ir.Value] | None, list[Condition]]:
    """The condition that becomes positions, these, and what it says beside: rather one with its keys in order, and
    rather one that says nothing beside."""
    found = []
    for condition, _ in masks.conditions if _may_have_positions(masks) else ():
        positions, rest = causal(editor, condition, grid)
        if positions is not None:
            found.append(((_in_order(positions[1]), not rest), condition, positions, rest))
    return max(found, key=lambda entry: entry[0])[1:] if found else (None, None, [])


def _in_order(positions: ir.Value) -> bool:
    """Whether the positions do not fall from one key to the next, or are data."""
    data = array(positions)
    return data is None or bool((np.diff(data) >= 0).all())


def _may_have_positions(masks: Masks) -> bool:
    """Whether a key that its position hides has the same score as one that the mask hides."""
    if masks.fill == -math.inf or masks.added is None:
        return True
    return masks.moderate and masks.added.dtype == ir.DataType.FLOAT


def split(editor: Editor, term: Term) -> list[Term]:
    """A value that is added as one term, as several: a sum with a mask, or a selection between a bias and a number
    that hides, where that comes to the same."""
    value = term.value
    if value is None or term.factor != 1:
        return [term]
    node = producer(value, "Add", "Where", "Expand", "Identity", "Reshape")
    if node is None or selection(editor, value) is not None:
        return [term]
    inputs = [given(node, i) for i in range(len(node.inputs))]
    if node.op_type == "Reshape":
        before, after = shape_of(inputs[0]), shape_of(value)
        if before[-2:] != after[-2:] or math.prod(before[:-2]) != math.prod(term.batch):
            return [term]
        parts = split(editor, replace(term, value=inputs[0], batch=before[:-2]))
        return parts if len(parts) > 1 else [term]
    if node.op_type in ("Expand", "Identity"):
        parts = split(editor, replace(term, value=inputs[0]))
        return parts if len(parts) > 1 else [term]
    if node.op_type == "Add":
        found = [selection(editor, v) for v in inputs]
        fills = [x.fill if x is not None else 0.0 for x in found]
        absorbed = min(fills) <= ABSORBS and all(moderate(v) for v, fill in zip(inputs, fills) if fill > ABSORBS)
        if min(fills) == -math.inf or (absorbed and max(fills) > ABSORBS):
            return [part for v in inputs for part in split(editor, replace(term, value=v))]
        return [term]
    for bias, other, condition in (
        (inputs[1], inputs[2], Condition(inputs[0])),
        (inputs[2], inputs[1], ~Condition(inputs[0])),
    ):
        fill = number_of(other)
        if fill is not None and fill <= ABSORBS:
            return [*split(editor, replace(term, value=bias)), Term(term.batch, seen=condition, fill=fill)]
    return [term]


def _selected(
    editor: Editor, masks: Masks, value: ir.Value, grid: Grid, alone: bool
) -> tuple[list[Condition], float] | None:
    """The conditions and the fill that an additive mask stands for, where adding it is the same as selecting.

    `alone` says that nothing else hides keys: then no row is hidden wholly, if this mask does not.
    """
    found = selection(editor, value)
    if found is None or found.fill > HIDES:
        return None
    parts = [c for condition in found.conditions for c in conditions(editor, condition)]
    if alone and shape_of(value)[-1] == grid.t and len(parts) == 1:
        seen = seen_by(parts[0].value, parts[0].negated)
        if seen is not None and seen.some:
            return parts, -math.inf
    if found.fill > ABSORBS:
        return None
    agrees = not masks.conditions and (masks.added is None or masks.moderate)
    return (parts, found.fill) if found.fill == -math.inf or agrees else None


def _take(editor: Editor, masks: Masks, term: Term, grid: Grid, alone: bool) -> None:
    """Add one term to the masks."""
    value, fill = term.value, term.fill
    found: list[Condition] = []
    if value is not None and (term.factor == 1 or array(value) is None) and term.factor > 0:
        chosen = _selected(editor, masks, value, grid, alone)
        if chosen is not None:
            found, fill, value = chosen[0], chosen[1] * term.factor, None
    if value is not None:
        if not is_zero(value):
            _add(editor, masks, value, term.factor, grid)
        return
    if term.seen is not None:
        found = conditions(editor, term.seen)
    if masks.conditions and masks.fill != fill:
        _settle(editor, masks, grid)
    pairs = [(c, grid.batch) for c in found]
    if masks.added is not None and fill != -math.inf and not masks.moderate:
        masks.added = _select(editor, _conjunction(editor, pairs, grid), masks.added, fill)
        return
    masks.conditions += [c for c in pairs if c not in masks.conditions]
    masks.fill = fill


def _add(editor: Editor, masks: Masks, value: ir.Value, factor: float, grid: Grid) -> None:
    """Add to what is additive."""
    small = moderate(value)
    if masks.fill is not None and masks.fill != -math.inf and not small:
        _settle(editor, masks, grid)
    bias = rank4(editor, shrunk(editor, value), grid)
    if factor != 1:
        bias = editor.times(bias, factor)
    masks.added = bias if masks.added is None else _sum(editor, masks.added, bias)
    masks.moderate = masks.moderate and small


def _settle(editor: Editor, masks: Masks, grid: Grid) -> None:
    """Turn the conditions so far into an additive mask, for what follows does not agree with them."""
    seen = _conjunction(editor, masks.conditions, grid)
    if seen is not None:
        zero = masks.added if masks.added is not None else editor.number(0.0, ir.DataType.FLOAT)
        masks.added = _select(editor, seen, zero, masks.fill)
    masks.conditions, masks.fill, masks.moderate = [], None, False


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
    value, negated = shrunk(editor, condition.value), condition.negated
    seen = truth_of(condition)
    if seen is not None and seen.nbytes <= SMALL and (negated or value.dtype != ir.DataType.BOOL):
        return editor.constant(seen, "mask")
    if not condition.boolean and negated:
        return editor.cast(value, ir.DataType.BOOL)
    if not condition.boolean:
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
        raise Miss(f"the mask has rank {len(shape)}, the scores have rank {len(grid.batch) + 2}", code="OM3103")
    padded = (1,) * (len(grid.batch) + 2 - len(shape)) + shape
    batch = grouped(padded[:-2], grid.batch, grid.b, grid.h)
    if batch is None or batch[0] not in (1, grid.b) or batch[1] not in (1, grid.h):
        padded = (*grid.batch, *padded[-2:])
        value = editor.op("Expand", [value], padded, domain=DOMAIN)
        batch = grouped(grid.batch, grid.batch, grid.b, grid.h)
    if batch is None:
        raise Miss(f"the mask of shape {list(shape)} does not fit {grid.b} x {grid.h} heads", code="OM3103")
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
