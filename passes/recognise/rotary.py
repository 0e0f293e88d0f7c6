"""Rotary embeddings, `x * cos + rotate(x) * sin` (RoFormer, arXiv:2104.09864), however they are written.

Two forms have an anchor: `rotate(x)` put together from the parts of x and multiplied as a whole, and the parts
multiplied one by one, then put together:

    concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)

The parts are the halves of the last dim, or its even and its odd entries (interleaved).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.match import (
    DOMAIN,
    Editor,
    Finding,
    Miss,
    after_cast,
    anchors,
    array,
    before_cast,
    given,
    integer,
    ints,
    label,
    last_axis,
    only_user,
    other,
    producer,
    scalar,
    scaled,
    shape_of,
)
from onnxmesh.passes.recognise.layout import Step, onward, permutation, view

PATTERN = "Rotary"


@dataclass(frozen=True, slots=True)
class Whole:
    """A value that is taken apart: `value`, seen with `shape`, in halves or `interleaved`."""

    value: ir.Value
    shape: tuple[int, ...]
    interleaved: bool

    def is_(self, value: ir.Value) -> bool:
        """Whether `value`, or what it is a cast of, is this one."""
        value = before_cast(value)
        if shape_of(value) != self.shape:
            return False
        node = producer(value, "Reshape")
        return value is self.value or (node is not None and node.inputs[0] is self.value)


@dataclass(frozen=True, slots=True)
class Part:
    """The first or the second part of a value."""

    of: Whole
    second: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """`value` holds two parts put together, after `steps` on the joined tensor of `shape`."""

    value: ir.Value
    first: ir.Value
    second: ir.Value
    interleaved: bool
    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Rotation:
    """What the op needs."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool


def recognise_rotary(editor: Editor) -> Iterator[Finding]:
    """Replace the rotary embedding around every value that is put together from two parts."""
    for node in anchors(editor.graph, "Concat"):
        if len(node.inputs) > 2 and last_axis(node) and _among_others(editor, node):
            yield Finding(PATTERN, label(node), True, "halves, beside features that are not rotated")
    for node in anchors(editor.graph, "Concat", "ScatterND"):
        joined = _joined(node)
        if joined is None:
            continue
        kind = "interleaved" if joined.interleaved else "halves"
        try:
            if (rotated := _rotated(joined)) is not None:
                rotation, value = _whole(joined, rotated)
                _replace(editor, rotation, value, shape_of(value), ())
            elif (found := _parts(editor, joined)) is not None:
                _replace(editor, found, joined.value, joined.shape, joined.steps)
            else:
                continue
        except Miss as miss:
            yield Finding(PATTERN, label(node), False, miss.reason)
            continue
        yield Finding(PATTERN, label(node), True, kind)


def _among_others(editor: Editor, node: ir.Node) -> bool:
    """Replace a rotary embedding whose two parts are put together in one Concat with what is not rotated."""
    inputs = [v for v in node.inputs if v is not None]
    for i, (first, second) in enumerate(pairwise(inputs)):
        shape = shape_of(first)
        if shape != shape_of(second):
            continue
        whole = (*shape[:-1], 2 * shape[-1])
        try:
            found = _parts(editor, Joined(node.outputs[0], first, second, False, whole))
        except Miss:
            continue
        if found is not None:
            x = editor.cast(found.x, first.dtype or ir.DataType.FLOAT)
            out = editor.op(PATTERN, [x, found.cos, found.sin], whole, attrs={"interleaved": 0}, domain=DOMAIN)
            parts = [*inputs[:i], out, *inputs[i + 2 :]]
            joined = editor.op("Concat", parts, shape_of(node.outputs[0]), attrs={"axis": len(whole) - 1})
            editor.replace(node.outputs[0], joined)
            return True
    return False


def _replace(editor: Editor, found: Rotation, value: ir.Value, shape: Sequence[int], steps: Sequence[Step]) -> None:
    """Put a Rotary, followed by `steps`, in the place of `value`."""
    assert value.dtype is not None
    x = editor.cast(found.x, value.dtype)
    old, rest = onward(value, shape, steps) if steps else (value, [])
    attrs = {"interleaved": int(found.interleaved)}
    out = editor.op(PATTERN, [x, found.cos, found.sin], shape, attrs=attrs, domain=DOMAIN)
    editor.replace(old, view(editor, out, rest))


# --- the two forms ------------------------------------------------------------------------------------------


def _rotated(joined: Joined) -> Whole | None:
    """x, where the joined value is `rotate(x)`: the negative of its second part, then the first."""
    negative = _negated(joined.first)
    if negative is None or joined.steps:
        return None
    second, first = _part(negative, joined.interleaved), _part(joined.second, joined.interleaved)
    if second is None or first is None:
        sources = [_sliced(v) for v in (negative, _bare(joined.second))]
        if sources[0] is not None and sources[0] is sources[1]:
            raise Miss("the parts of the rotated value are not the two halves of the last dim", code="OM3201")
        return None
    if first.of != second.of:
        return None
    if first.second or not second.second:
        raise Miss("the parts are rotated the other way: expected (-second, first)", code="OM3201")
    _check_joined(joined, first.of)
    return first.of


def _check_joined(joined: Joined, whole: Whole) -> None:
    if whole.interleaved != joined.interleaved:
        raise Miss("the parts are taken apart one way and put together the other way", code="OM3201")
    _check_shape(joined, whole)


def _check_shape(joined: Joined, whole: Whole) -> None:
    if whole.shape != joined.shape:
        raise Miss(f"parts of {list(whole.shape)} are put together as {list(joined.shape)}", code="OM3201")


def _whole(joined: Joined, whole: Whole) -> tuple[Rotation, ir.Value]:
    """`x * cos + rotate(x) * sin` behind `rotate(x)`, and its value."""
    rotated = after_cast(joined.value)
    product = only_user(rotated, "Mul")
    if product is None:
        raise Miss("rotate(x) is not multiplied by one table", code="OM3202")
    total = only_user(product.outputs[0], "Add")
    if total is None:
        raise Miss("rotate(x) * sin is not added to one value", code="OM3202")
    straight = producer(other(total, product.outputs[0]), "Mul")
    if straight is None:
        raise Miss("what rotate(x) * sin is added to is not a product", code="OM3202")
    sides = [i for i in (0, 1) if whole.is_(given(straight, i))]
    if not sides:
        raise Miss("what rotate(x) * sin is added to is not x * cos of the same x", code="OM3202")
    x, cos, sin = given(straight, sides[0]), given(straight, 1 - sides[0]), other(product, rotated)
    _check_table(cos, shape_of(x), shape_of(x)[-1])
    _check_table(sin, shape_of(x), shape_of(x)[-1])
    if shape_of(total.outputs[0]) != shape_of(x):
        raise Miss("the tables have more dims than x", code="OM3203")
    return Rotation(x, cos, sin, joined.interleaved), total.outputs[0]


def _parts(editor: Editor, joined: Joined) -> Rotation | None:
    """`concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`; None where the joined values are something else."""
    difference, total = producer(_bare(joined.first), "Sub"), producer(_bare(joined.second), "Add")
    if difference is None or total is None:
        return None
    products = [producer(given(node, i), "Mul") for node in (difference, total) for i in (0, 1)]
    factors = [_factors(product, joined.interleaved) for product in products if product is not None]
    shared = set.intersection(*({p.of for p, _ in pairs} for pairs in factors)) if len(factors) == 4 else set()
    if len(shared) != 1:
        return None
    whole = shared.pop()
    a, b, c, d = [next((p.second, t) for p, t in pairs if p.of == whole) for pairs in factors]
    if c[0] < d[0]:
        c, d = d, c
    if [second for second, _ in (a, b, c, d)] != [False, True, True, False]:
        raise Miss("the parts of x are not combined as x1 * cos - x2 * sin, x2 * cos + x1 * sin", code="OM3202")
    _check_shape(joined, whole)
    cos, sin = _table(a[1], c[1], joined), _table(b[1], d[1], joined)
    x = editor.reshape(whole.value, whole.shape)
    if whole.interleaved != joined.interleaved:
        x = _reordered(editor, x, whole.interleaved)
    return Rotation(x, cos, sin, joined.interleaved)


def _reordered(editor: Editor, x: ir.Value, interleaved: bool) -> ir.Value:
    """x with its pairs as halves, or its halves as pairs: DeepSeek takes pairs apart and puts halves together."""
    shape = shape_of(x)
    half, rank = shape[-1] // 2, len(shape)
    parts = (*shape[:-1], half, 2) if interleaved else (*shape[:-1], 2, half)
    swap = (*range(rank - 1), rank, rank - 1)
    return view(editor, x, [Step("reshape", parts), Step("transpose", swap), Step("reshape", shape)])


def _factors(product: ir.Node, interleaved: bool) -> list[tuple[Part, ir.Value]]:
    """(part, other factor) for the factors of a product that are a part of something, of the product's shape."""
    found = []
    for i in (0, 1):
        part = _part(before_cast(_bare(given(product, i))), interleaved)
        if part is not None and shape_of(product.inputs[i]) == shape_of(product.outputs[0]):
            found.append((part, given(product, 1 - i)))
    return found


def _table(one: ir.Value, two: ir.Value, joined: Joined) -> ir.Value:
    """The table for both parts: the same value, or the table whose parts the two are."""
    half = (*joined.shape[:-1], joined.shape[-1] // 2)
    if one is two:
        _check_table(one, half, half[-1])
        return one
    first, second = _part(one, joined.interleaved), _part(two, joined.interleaved)
    if first is None or second is None or first.of != second.of or first.second or not second.second:
        raise Miss("the two parts are multiplied by different tables", code="OM3203")
    if first.of.interleaved != joined.interleaved:
        raise Miss("the table is taken apart in another way than x", code="OM3203")
    _check_table(first.of.value, joined.shape, joined.shape[-1])
    return first.of.value


def _check_table(table: ir.Value, shape: tuple[int, ...], size: int) -> None:
    found = shape_of(table)
    if found[-1:] != (size,):
        raise Miss(f"a table has the last dim {found[-1] if found else 1}, expected {size}", code="OM3203")
    if len(found) > len(shape) or any(n not in (1, m) for n, m in zip(found[::-1], shape[::-1])):
        raise Miss(f"a table of shape {list(found)} does not broadcast to {list(shape)}", code="OM3203")


# --- taking apart -------------------------------------------------------------------------------------------


def _bare(value: ir.Value) -> ir.Value:
    """The value before reshapes that add or remove dims of size 1."""
    node = producer(value, "Reshape")
    while node is not None and _squeezed(shape_of(node.inputs[0])) == _squeezed(shape_of(value)):
        value = given(node, 0)
        node = producer(value, "Reshape")
    return value


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _negated(value: ir.Value) -> ir.Value | None:
    """x where `value` is -x."""
    node = producer(_bare(value), "Neg", "Mul")
    found = scaled(node) if node is not None else None
    return _bare(found[0]) if found is not None and found[1] == -1 else None


def _sliced(value: ir.Value) -> ir.Value | None:
    node = producer(value, "Slice", "Split", "Gather")
    return given(node, 0) if node is not None else None


def _part(value: ir.Value, interleaved: bool) -> Part | None:
    """The part of the last dim of x that `value` is; of a dim of size 2, a half or as `interleaved` says."""
    value = _bare(value)
    cut = _cut(value)
    if cut is None:
        return None
    source, axis, start, step, size = cut
    shape = shape_of(source)
    rank = len(shape)
    if size == 1 and axis >= rank - 2 >= 0 and shape[axis] == 2 and (interleaved or axis < rank - 1):
        return _unbound(source, start == 1, axis == rank - 1)
    if axis != rank - 1 or 2 * size != shape[-1]:
        return None
    if (step, start) in ((1, 0), (1, size)):
        return Part(Whole(source, shape, False), start > 0)
    return Part(Whole(source, shape, True), start == 1) if step == 2 else None


def _unbound(source: ir.Value, second: bool, interleaved: bool) -> Part:
    """A slice of length 1 of x seen as `[.., d/2, 2]` or `[.., 2, d/2]`."""
    node, shape = producer(source, "Reshape"), shape_of(source)
    x = given(node, 0) if node is not None else source
    return Part(Whole(x, (*shape[:-2], shape[-2] * shape[-1]), interleaved), second)


def _cut(value: ir.Value) -> tuple[ir.Value, int, int, int, int] | None:
    """(source, axis, start, step, size) where `value` is a slice of one axis."""
    node = producer(value, "Slice", "Split", "Gather")
    if node is None:
        return None
    source = given(node, 0)
    rank = len(shape_of(source))
    if node.op_type == "Slice":
        axes, starts, steps = ints(node, "axes"), ints(node, "starts"), ints(node, "steps")
        if len(axes) != 1:
            return None
        axis = axes[0] % rank
        return source, axis, starts[0], steps[0], shape_of(value)[axis]
    axis = integer(node, "axis") % rank
    if node.op_type == "Split":
        index = list(node.outputs).index(value)
        start = sum(shape_of(v)[axis] for v in node.outputs[:index])
        return source, axis, start, 1, shape_of(value)[axis]
    position = scalar(node.inputs[1])
    if position is None:
        return None
    return source, axis, int(position) % shape_of(source)[axis], 1, 1


# --- putting together ---------------------------------------------------------------------------------------


def _joined(node: ir.Node) -> Joined | None:
    """The two parts that a node puts together along the last dim."""
    return _concatenated(node) if node.op_type == "Concat" else _scattered(node)


def _concatenated(node: ir.Node) -> Joined | None:
    """Concat of halves; or of `[.., d/2, 1]` (pairs) or `[.., 1, d/2]` (halves), then a Reshape."""
    if len(node.inputs) != 2:
        return None
    out, first, second = node.outputs[0], given(node, 0), given(node, 1)
    shape = shape_of(out)
    following = only_user(out, "Reshape")
    last = last_axis(node)
    same = shape_of(first) == shape_of(second)
    if following is not None and len(shape) > 1 and same:
        stacked = (shape[-1] == 2 and last) or (shape[-2] == 2 and integer(node, "axis") in (-2, len(shape) - 2))
        whole = (*shape[:-2], shape[-2] * shape[-1])
        value = following.outputs[0]
        if stacked and shape_of(value)[-1] % whole[-1] == 0:
            return _stacked(Joined(value, first, second, last, shape_of(value)), whole)
    return Joined(out, first, second, False, shape) if last else None


def _stacked(joined: Joined, whole: tuple[int, ...]) -> Joined | None:
    """The joined value where the Reshape behind it merged no more than the stacked dims, or more: as a step."""
    if joined.shape == whole:
        return joined
    return Joined(
        joined.value, joined.first, joined.second, joined.interleaved, whole, (Step("reshape", joined.shape),)
    )


def _scattered(node: ir.Node) -> Joined | None:
    """Two ScatterND one after the other that fill dim 0, where the last dim stands, from two parts."""
    inner = producer(node.inputs[0], "ScatterND")
    if inner is None or only_user(inner.outputs[0]) is not node:
        return None
    shape, parts = shape_of(node.outputs[0]), []
    for scatter in (inner, node):
        rows, updates = array(scatter.inputs[1]), producer(scatter.inputs[2], "Transpose")
        reduction = scatter.attributes.get_string("reduction", "none")
        if rows is None or updates is None or reduction != "none" or rows.shape != (shape[0] // 2, 1):
            return None
        parts.append((rows[:, 0] % shape[0], given(updates, 0), permutation(updates)))
    parts.sort(key=lambda part: int(part[0][0]))
    (rows, first, perm), (more, second, same) = parts
    if perm != same or perm[0] != len(shape) - 1 or not np.array_equal(more, rows + more[0]) or rows[0] != 0:
        return None
    step = int(rows[1]) if len(rows) > 1 else 1
    if not np.array_equal(rows, np.arange(len(rows)) * step) or (step, int(more[0])) not in (
        (1, len(rows)),
        (2, 1),
    ):
        return None
    whole = (*shape_of(first)[:-1], shape[0])
    return Joined(node.outputs[0], first, second, step == 2, whole, (Step("transpose", perm),))
