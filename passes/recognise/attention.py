"""Attention from the ops around a Softmax: two contractions, and between them scales, a soft cap and masks.

The softmax is the anchor. `recognise_scores` walks from it to the contractions on both sides; here the operands are
brought into the form of the op, `softmax(scale * q k^T -> softcap -> + mask) v` over `[b, h, s, d]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxmesh.passes.graph.match import (
    DOMAIN,
    Editor,
    Finding,
    Miss,
    after_cast,
    anchors,
    given,
    is_constant,
    label,
    shape_of,
)
from onnxmesh.passes.recognise.contraction import Contraction
from onnxmesh.passes.recognise.layout import Found, Step, chain, layout, onward, resolve, view
from onnxmesh.passes.recognise.mask_conditions import Condition, conditions
from onnxmesh.passes.recognise.masks import Grid, Masks, Term, gather, grouped, rank4
from onnxmesh.passes.recognise.scores import Scores, Weights, between_contractions, find_scores, find_weights

PATTERN = "Attention"


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand of the attention: the value in the graph, then steps to `[b or 1, heads, rows, size]`."""

    value: ir.Value
    steps: list[Step]


@dataclass(frozen=True, slots=True)
class Inputs:
    """q, k and v as they should be read, in one element type."""

    q: Found
    k: Found
    v: Found
    dtype: ir.DataType | None
    out: ir.Value

    @property
    def scale(self) -> float:
        """What q and k were multiplied by on the way."""
        return self.q.scale * self.k.scale


def recognise_attention(editor: Editor) -> Iterator[Finding]:
    """Replace the attention around every Softmax."""
    for node in anchors(editor.graph, "Softmax"):
        finding = _around(editor, node)
        if finding is not None:
            yield finding


def _around(editor: Editor, softmax: ir.Node) -> Finding | None:
    """Replace the attention around one Softmax; None where nothing speaks for attention."""
    scores: Scores | Miss
    weights: Weights | Miss
    try:
        scores = find_scores(softmax)
    except Miss as miss:
        scores = miss
    try:
        weights = find_weights(softmax)
    except Miss as miss:
        weights = miss
    name = label(softmax)
    if isinstance(scores, Miss):
        plausible = isinstance(weights, Weights) or between_contractions(softmax)
        return Finding(PATTERN, name, False, scores.reason) if plausible else None
    if isinstance(weights, Miss):
        computed = not any(is_constant(v) for v in scores.source.operands)
        return Finding(PATTERN, name, False, weights.reason) if computed else None
    keys = scores.source.operands[scores.key]
    if is_constant(keys) and len(shape_of(keys)) == 2:
        return None  # a linear, a softmax, a product
    try:
        reason = _replace(editor, scores, weights)
    except Miss as miss:
        editor.drop_unused()
        return Finding(PATTERN, name, False, miss.reason)
    if softmax.graph is editor.graph:
        reason += "; its weights have other users and are computed beside it"
    editor.drop_unused()
    return Finding(PATTERN, name, True, reason)


def _replace(editor: Editor, scores: Scores, weights: Weights) -> str:
    """Put an Attention in the place of the second contraction. Returns what it has, for the report.

    Raises:
        Miss: something does not fit.
    """
    source, target = scores.source, weights.target
    if (scores.sink is not None) != weights.dropped:
        raise Miss("a score without a key stands beside the others, and its weight meets a value", code="OM3105")
    sizes = source.sizes()
    s, t = sizes[source.out[-2]], sizes[source.out[-1]]
    key = scores.key
    full = tuple(sizes[c] for c in source.out[:-2])
    b, h = _heads(scores, weights, source, key, full)
    grid = Grid(b, h, s, t)
    inner = source.summed
    q = _operand(source, 1 - key, source.out[:-2], source.out[-2] + inner, full, grid)
    k = _operand(source, key, source.out[:-2], source.out[-1] + inner, full, grid)
    v, rest = _values(target, weights, grid)
    inputs = _inputs(q, k, v, source.node.outputs[0].dtype, target.node.outputs[0])
    masks = gather(editor, scores.terms, grid)
    attrs: dict[str, float | str] = {
        "scale": scores.scale * inputs.scale,
        "softcap": scores.cap,
        "masked_row": _masked_row(editor, scores, weights, masks),
    }
    old, steps = onward(inputs.out, (b, h, s, inputs.v.shape[3]), rest)
    node = _attention(editor, inputs, scores, masks, grid, attrs)
    out = node.outputs[0] if scores.sink is None else _shared_with_sink(editor, node, scores.sink, grid, scores.batch)
    editor.replace(old, editor.cast(view(editor, out, steps), old.dtype or ir.DataType.FLOAT))
    return _describe(node)


# --- operands -----------------------------------------------------------------------------------------------


def _heads(scores: Scores, weights: Weights, source: Contraction, key: int, full: tuple[int, ...]) -> tuple[int, int]:
    """(batch, heads) of the attention: the batch dims of the scores where there are two."""
    stages = [full, weights.batch, *(term.batch for term in scores.terms)]
    two = next((stage for stage in stages if len(stage) == 2), None)
    if two is not None:
        return two[0], two[1]
    longest = max(stages, key=len)
    if len(longest) >= 3:
        kept = source.labels[key]
        grouped_heads = source.out[len(full) - 1] not in kept or (
            shape_of(source.operands[key])[kept.index(source.out[len(full) - 1])] == 1
        )
        cut = len(longest) - (2 if grouped_heads and longest == full and full[-1] > 1 else 1)
        return math.prod(longest[:cut]), math.prod(longest[cut:])
    if not longest:
        return 1, 1
    return _split_batch(source, 1 - key, longest[0])


def _split_batch(source: Contraction, index: int, size: int) -> tuple[int, int]:
    """(batch, heads) for scores with one batch dim, from the way in which the queries were made.

    Heads were split from a dim; a batch was there whole.
    """
    labels, name = source.labels[index], source.out[0]
    if name not in labels:
        return size, 1
    value, steps = source.operands[index], list[Step]()
    links = [(value, Step("cast")), *chain(value)]
    for count in range(len(links), 0, -1):
        steps = [s for _, s in reversed(links[:count]) if s.kind not in ("cast", "scale")]
        origin = shape_of(links[count - 1][0])
        result = layout(origin, steps)
        if result is None:
            continue
        atoms = result.dims[labels.index(name)]
        if len(atoms) > 1:
            return size // atoms[-1].size, atoms[-1].size
        whole = not atoms or atoms[0].origin < 0 or origin[atoms[0].origin] == size
        return (size, 1) if whole else (1, size)
    return size, 1


def _operand(source: Contraction, index: int, batch: str, matrix: str, full: Sequence[int], grid: Grid) -> Operand:
    """An operand with its dims in the order batch, `matrix`, and the batch dims as two."""
    value, labels = source.operands[index], source.labels[index]
    sizes = dict(zip(labels, shape_of(value)))
    order = [c for c in batch if c in labels] + list(matrix)
    if sorted(order) != sorted(labels):
        raise Miss(
            f"the dims of an operand of {label(source.node)} are not batch, rows and one summed dim", code="OM3101"
        )
    two = grouped([sizes.get(c, 1) for c in batch], full, grid.b, grid.h)
    if two is None or two[0] not in (1, grid.b):
        raise Miss(
            f"an operand of {label(source.node)} broadcasts in its batch dims, {list(sizes.values())}", code="OM3101"
        )
    perm = tuple(labels.index(c) for c in order)
    return Operand(value, [Step("transpose", perm), Step("reshape", (*two, sizes[matrix[0]], sizes[matrix[1]]))])


def _values(target: Contraction, weights: Weights, grid: Grid) -> tuple[Operand, list[Step]]:
    """v, and the steps from `[b,h,s,e]` to the output of the second contraction."""
    mine, other = target.labels[weights.index], target.labels[1 - weights.index]
    s, t = (mine[-1], mine[-2]) if weights.swapped else (mine[-2], mine[-1])
    batch = mine[:-2]
    e = [c for c in other if c not in mine]
    if target.summed != t or len(e) != 1 or not set(batch + s) <= set(target.out):
        raise Miss(f"{label(target.node)} does not sum over the keys alone", code="OM3105")
    sizes = target.sizes()
    full = [sizes[c] for c in batch]
    if math.prod(full) != grid.b * grid.h:
        raise Miss(f"the weights broadcast over the values of {label(target.node)}", code="OM3105")
    v = _operand(target, 1 - weights.index, batch, t + e[0], full, grid)
    order = batch + s + e[0]
    if len(order) != len(target.out):
        raise Miss(f"the output of {label(target.node)} is not batch, queries and values", code="OM3105")
    rest = [
        Step("reshape", tuple(sizes[c] for c in order)),
        Step("transpose", tuple(order.index(c) for c in target.out)),
    ]
    return v, rest


def _inputs(q: Operand, k: Operand, v: Operand, dtype: ir.DataType | None, out: ir.Value) -> Inputs:
    """The operands in one element type: that behind a cast of the output, of the output, or of the scores."""
    for result in dict.fromkeys((after_cast(out), out)):
        found = _resolved(q, k, v, result.dtype, result.dtype)
        if found is not None:
            return Inputs(*found, result.dtype, result)
    found = _resolved(q, k, v, dtype, out.dtype)
    if found is None:
        raise Miss("the element types of q, k and v do not go together", code="OM3106")
    return Inputs(*found, dtype, out)


def _resolved(
    q: Operand, k: Operand, v: Operand, dtype: ir.DataType | None, v_dtype: ir.DataType | None
) -> tuple[Found, Found, Found] | None:
    """q, k and v in these element types; k and v without their repetition over heads where it is the same."""
    found_q = resolve(q.value, q.steps, dtype)
    for repeated in (1, None):
        found_k = resolve(k.value, k.steps, dtype, repeated)
        found_v = resolve(v.value, v.steps, v_dtype, repeated, absorb=False)
        if found_q is None or found_k is None or found_v is None:
            continue
        heads = {found_k.shape[1], found_v.shape[1]}
        if len(heads) == 1 or (1 in heads and repeated is None):
            return found_q, found_k, found_v
    return None


def _attention(
    editor: Editor, inputs: Inputs, scores: Scores, masks: Masks, grid: Grid, attrs: dict[str, float | str]
) -> ir.Node:
    """The Attention op over the operands, brought to rank 4; one that tells its statistics where there is a sink."""
    heads = max(inputs.k.shape[1], inputs.v.shape[1])
    if grid.h % heads:
        raise Miss(f"{grid.h} heads of q cannot share {heads} heads of k and v", code="OM3106")
    q = _expanded(editor, inputs.q, grid.b, grid.h, inputs.dtype)
    for op, factor, batch in scores.factors:
        number = rank4(editor, factor, grid.at(batch))
        q = editor.op(op, [q, editor.cast(number, inputs.dtype or ir.DataType.FLOAT)], shape_of(q))
    k = _expanded(editor, inputs.k, grid.b, heads, inputs.dtype)
    v = _expanded(editor, inputs.v, grid.b, heads, inputs.dtype)
    positions = masks.positions or (None, None)
    out = ((grid.b, grid.h, grid.s, inputs.v.shape[3]), inputs.dtype or ir.DataType.FLOAT)
    row = ((grid.b, grid.h, grid.s, 1), ir.DataType.FLOAT)
    op, outs = (PATTERN, [out]) if scores.sink is None else ("AttentionBlock", [out, row, row])
    return editor.node(op, [q, k, v, masks.mask, *positions], outs, attrs, DOMAIN)


def _shared_with_sink(editor: Editor, node: ir.Node, sink: ir.Value, grid: Grid, batch: tuple[int, ...]) -> ir.Value:
    """The attention times the part of the weight that its keys have: sigmoid(log-sum-exp of the scores - sink)."""
    out, highest, total = node.outputs
    row = shape_of(total)
    scores = editor.op("Add", [highest, editor.op("Log", [total], row)], row)
    beside = editor.cast(rank4(editor, sink, grid.at(batch)), ir.DataType.FLOAT)
    part = editor.op("Sigmoid", [editor.op("Sub", [scores, beside], row)], row)
    return editor.op("Mul", [out, editor.cast(part, out.dtype or ir.DataType.FLOAT)], shape_of(out))


def _expanded(editor: Editor, found: Found, b: int, heads: int, dtype: ir.DataType | None) -> ir.Value:
    value = view(editor, found.value, found.steps)
    if dtype is not None:
        value = editor.cast(value, dtype)
    return view(editor, value, [Step("expand", (b, heads, *found.shape[2:]))])


# --- the output ---------------------------------------------------------------------------------------------


def _masked_row(editor: Editor, scores: Scores, weights: Weights, masks: Masks) -> str:
    """What a row that sees no key gives."""
    if weights.hidden is not None:
        before = {c for c, _ in masks.conditions}
        if set(conditions(editor, weights.hidden)) != before or masks.added is not None:
            raise Miss("the mask behind the softmax is not the one before it", code="OM3103")
        return "zero"
    if scores.floor or (masks.fill is not None and masks.fill != -math.inf):
        return "uniform"
    return "zero" if weights.guarded else "nan"


def _describe(node: ir.Node) -> str:
    """The properties of an Attention in words."""
    q, k = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    words = [f"{q[1]} heads", f"{q[2]} queries", f"{k[2]} keys"]
    if k[1] != q[1]:
        words.insert(1, f"{k[1]} heads of k and v")
    if len(node.inputs) > 4:
        words.append("causal")
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        boolean = node.inputs[3].dtype == ir.DataType.BOOL
        words.append("boolean mask" if boolean else "additive mask")
    if len(node.outputs) > 1:
        words.append("a sink")
    return ", ".join(words)


# --- Attention ops that were there ---------------------------------------------------------------------------


def refine_attention(editor: Editor) -> Iterator[Finding]:
    """Attention ops of the model: their k and v without repetition, their mask as data where it is causal."""
    for node in anchors(editor.graph, PATTERN):
        words = [w for w in (_without_copies(editor, node), _with_positions(editor, node)) if w]
        yield Finding(PATTERN, label(node), True, ", ".join([_describe(node), *words]))


def _without_copies(editor: Editor, node: ir.Node) -> str:
    """Take k and v from before they were repeated for the heads of q."""
    operands = [given(node, i) for i in (1, 2)]
    found = [resolve(v, [], v.dtype, 1, absorb=False) for v in operands]
    copies = {f.copies if f is not None else 1 for f in found}
    if copies == {1} or len(copies) > 1:
        return ""
    for i, operand in enumerate(found):
        assert operand is not None
        node.replace_input_with(i + 1, view(editor, operand.value, operand.steps))
        editor.prune(operands[i])
    return f"k and v were repeated {copies.pop()} times"


def _with_positions(editor: Editor, node: ir.Node) -> str:
    """Turn a mask, or its causal part, into positions; an additive one that only hides into a boolean one."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or len(node.inputs) > 4:
        return ""
    (b, h, s, _), t = shape_of(node.inputs[0]), shape_of(node.inputs[1])[2]
    boolean = mask.dtype == ir.DataType.BOOL
    term = Term((b, h), seen=Condition(mask)) if boolean else Term((b, h), value=mask)
    masks = gather(editor, [term], Grid(b, h, s, t))
    if masks.positions is None and (masks.mask is mask or (boolean and _size(masks.mask) >= _size(mask))):
        editor.drop_unused()
        return ""
    if masks.fill is not None and masks.fill != -math.inf:
        node.attributes["masked_row"] = ir.AttrString("masked_row", "uniform")
    node.resize_inputs(3)
    inputs = [masks.mask, *(masks.positions or ())]
    while inputs and inputs[-1] is None:
        inputs.pop()
    node.resize_inputs(3 + len(inputs))
    for i, value in enumerate(inputs):
        node.replace_input_with(3 + i, value)
    editor.prune(mask)
    editor.drop_unused()
    if masks.positions is not None:
        return "its mask was causal"
    return "part of its mask hid nothing" if boolean else "its mask was additive"


def _size(mask: ir.Value | None) -> int:
    return 0 if mask is None else math.prod(shape_of(mask))
