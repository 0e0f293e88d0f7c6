"""RMSNormalization and LayerNormalization from a mean of squares and what follows it.

y = x / sqrt(mean(x^2) + epsilon) * scale                      Zhang and Sennrich, arXiv:1910.07467
y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias       Ba, Kiros and Hinton, arXiv:1607.06450
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.match import (
    Editor,
    Finding,
    Miss,
    after_cast,
    anchors,
    before_cast,
    given,
    integer,
    ints,
    is_constant,
    is_float,
    label,
    only_user,
    other,
    producer,
    scalar,
    shape_of,
    users,
)

DEPTH = 4
"""Ops between a scale and the initialisers that it is computed from, at most."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm on the way to its output: `value` is what has been matched so far, `x` what is normalised."""

    x: ir.Value
    value: ir.Value
    epsilon: float
    centred: bool
    scale: ir.Value | None = None
    bias: ir.Value | None = None

    @property
    def pattern(self) -> str:
        """The op that the norm becomes."""
        return "LayerNormalization" if self.centred else "RMSNormalization"


def recognise_norms(editor: Editor) -> Iterator[Finding]:
    """Replace the norm around every mean of squares."""
    for node in anchors(editor.graph, "ReduceMean"):
        squared = _square_of(node.inputs[0])
        if squared is None:
            continue
        squared, variance = _variance_of(squared, node.outputs[0])
        centre = _centred(squared)
        pattern = "RMSNormalization" if centre is None else "LayerNormalization"
        epsilon = _epsilon(variance)
        if epsilon is None:
            continue
        try:
            norm = _match(editor, node, squared, centre, *epsilon)
        except Miss as miss:
            yield Finding(pattern, label(node), False, miss.reason)
            continue
        _replace(editor, norm)
        yield Finding(pattern, label(node), True, f"epsilon {norm.epsilon:g}")


# --- matching -----------------------------------------------------------------------------------------------


def _square_of(value: ir.Value | None) -> ir.Value | None:
    """x where `value` is its square."""
    node = producer(value, "Mul", "Pow")
    if node is None:
        return None
    if node.op_type == "Mul":
        return given(node, 0) if node.inputs[0] is node.inputs[1] else None
    return given(node, 0) if scalar(node.inputs[1]) == 2 else None


def _centred(value: ir.Value) -> ir.Value | None:
    """x where `value` is `x - mean(x)`."""
    node = producer(before_cast(value), "Sub")
    mean = producer(before_cast(given(node, 1)), "ReduceMean") if node is not None else None
    if node is None or mean is None or before_cast(given(mean, 0)) is not before_cast(given(node, 0)):
        return None
    return given(node, 0)


def _variance_of(x: ir.Value, mean: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(x - mean(x), variance) where the variance is `mean(x^2) - mean(x)^2`, as in flax; else the two as given."""
    difference = only_user(mean, "Sub")
    average = _square_of(difference.inputs[1]) if difference is not None else None
    source = producer(average, "ReduceMean")
    if difference is None or average is None or source is None or source.inputs[0] is not x:
        return x, mean
    centred = [n.outputs[0] for n in users(average, "Sub") if n.inputs[0] is x and n.inputs[1] is average]
    variance = difference.outputs[0]
    floor = only_user(variance, "Max", "Relu")
    if floor is not None and (floor.op_type == "Relu" or scalar(other(floor, variance)) == 0):
        variance = floor.outputs[0]
    return (centred[0], variance) if centred else (x, mean)


def _epsilon(variance: ir.Value) -> tuple[float, ir.Value] | None:
    """(epsilon, variance + epsilon) where one is added and the root is taken: else this is no norm."""
    add = only_user(variance, "Add")
    number = scalar(other(add, variance)) if add is not None else None
    if add is None or number is None or not users(add.outputs[0], "Sqrt", "Pow", "Rsqrt"):
        return None
    return number, add.outputs[0]


def _match(
    editor: Editor,
    mean: ir.Node,
    squared: ir.Value,
    centre: ir.Value | None,
    epsilon: float,
    variance: ir.Value,
) -> Norm:
    """The norm around a mean of squares.

    Raises:
        Miss: what follows is not a norm over the last axis.
    """
    rank = len(shape_of(mean.inputs[0]))
    _check_axes(mean, rank)
    inverse, root = _inverse_root(variance)
    if centre is None:
        value, scale = _normalised(squared, inverse, root)
        return _with_affine(editor, Norm(squared, value, epsilon, False, scale))
    average = given_mean(squared)
    _check_axes(average, rank)
    if inverse is not None and (norm := _expanded(centre, average.outputs[0], inverse, epsilon)) is not None:
        return norm
    value, scale = _normalised(squared, inverse, root)
    return _with_affine(editor, Norm(centre, value, epsilon, True, scale))


def _expanded(x: ir.Value, average: ir.Value, inverse: ir.Value, epsilon: float) -> Norm | None:
    """Keras: x * i + (bias - mean(x) * i), where i is the inverse root times the scale."""
    product = only_user(inverse, "Mul")
    if product is None or not _is_scale(other(product, inverse), x):
        return None
    factor = product.outputs[0]
    readers = {other(node, factor): node.outputs[0] for node in users(factor, "Mul")}
    if set(readers) != {x, average}:
        return None
    shift, total = only_user(readers[average], "Sub"), only_user(readers[x], "Add")
    if shift is None or total is None or shift.inputs[1] is not readers[average]:
        return None
    bias = given(shift, 0)
    if other(total, readers[x]) is not shift.outputs[0] or not _is_scale(bias, x):
        return None
    return Norm(x, total.outputs[0], epsilon, True, other(product, inverse), bias)


def given_mean(squared: ir.Value) -> ir.Node:
    """The ReduceMean of `x - mean(x)`."""
    node = producer(before_cast(squared), "Sub")
    assert node is not None
    mean = producer(before_cast(given(node, 1)), "ReduceMean")
    assert mean is not None
    return mean


def _check_axes(mean: ir.Node, rank: int) -> None:
    axes = [axis % rank for axis in ints(mean, "axes")]
    if axes != [rank - 1]:
        raise Miss(f"reduction over axes {axes} of {rank} dims, expected the last alone", code="OM3301")
    if not integer(mean, "keepdims", 1):
        raise Miss("the reduction does not keep its dim", code="OM3301")


def _inverse_root(variance: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
    """(1 / sqrt(variance), sqrt(variance)): what the graph has of them."""
    node = only_user(variance, "Sqrt", "Pow", "Rsqrt")
    if node is None:
        raise Miss("the variance has other users beside its root", code="OM3302")
    result = node.outputs[0]
    if node.op_type == "Rsqrt":
        return result, None
    power = scalar(node.inputs[1]) if node.op_type == "Pow" else 0.5
    if node.op_type == "Pow" and (node.inputs[0] is not variance or power not in (0.5, -0.5)):
        raise Miss(f"the variance is raised to {power}, expected 0.5 or -0.5", code="OM3302")
    if power == -0.5:
        return result, None
    inverse = only_user(result, "Reciprocal", "Div")
    if inverse is not None and (inverse.op_type == "Reciprocal" or scalar(inverse.inputs[0]) == 1):
        return inverse.outputs[0], None
    return None, result


def _normalised(x: ir.Value, inverse: ir.Value | None, root: ir.Value | None) -> tuple[ir.Value, ir.Value | None]:
    """(x / root, scale); the scale is there where it was multiplied into the inverse root first."""
    factor = inverse if inverse is not None else root
    assert factor is not None
    node = only_user(factor, "Mul" if inverse is not None else "Div")
    if node is None:
        readers = ", ".join(sorted(n.op_type for n in users(factor))) or "nothing"
        raise Miss(f"x / root is expected behind the root, but {readers} reads it", code="OM3302")
    value = other(node, factor)
    if root is not None and node.inputs[1] is not root:
        raise Miss("the root is divided, expected x / root", code="OM3302")
    if _same(value, x):
        return node.outputs[0], None
    following = only_user(node.outputs[0], "Mul") if inverse is not None else None
    if following is not None and _is_scale(value, x) and _same(other(following, node.outputs[0]), x):
        return following.outputs[0], value
    raise Miss("the value that the root divides is not the one that was squared", code="OM3302")


def _same(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values are equal: one value, casts of one, or differences of the same operands."""
    a, b = before_cast(a), before_cast(b)
    if a is b:
        return True
    first, second = producer(a, "Sub"), producer(b, "Sub")
    if first is None or second is None or before_cast(given(first, 0)) is not before_cast(given(second, 0)):
        return False
    means = [producer(before_cast(given(n, 1)), "ReduceMean") for n in (first, second)]
    return all(m is not None and before_cast(given(m, 0)) is before_cast(given(first, 0)) for m in means)


# --- scale and bias -----------------------------------------------------------------------------------------


def _with_affine(editor: Editor, norm: Norm) -> Norm:
    """The norm with the scale and the bias that follow it, in the one element type that all of it has.

    Half precision is cast up before the squares, and down again before or behind the scale.
    """
    narrow = before_cast(norm.x)
    down = after_cast(norm.value)
    if norm.scale is None and down.dtype == narrow.dtype != norm.value.dtype:
        return _biased(_scaled(replace(norm, x=narrow, value=down)))
    wide = _biased(_scaled(norm))
    down = after_cast(wide.value)
    if down.dtype != narrow.dtype or narrow.dtype == wide.value.dtype:
        return wide
    scale, bias = (_narrowed(editor, v, narrow.dtype) for v in (wide.scale, wide.bias))
    if (scale is None) != (wide.scale is None) or (bias is None) != (wide.bias is None):
        return wide
    return Norm(narrow, down, norm.epsilon, norm.centred, scale, bias)


def _narrowed(editor: Editor, value: ir.Value | None, dtype: ir.DataType | None) -> ir.Value | None:
    """What `value` is a cast of, in the given type."""
    if value is None or dtype is None:
        return None
    source = before_cast(value)
    return source if source.dtype == dtype else editor.narrow(value, dtype)


def _scaled(norm: Norm) -> Norm:
    """The norm with the Mul by a scale that follows."""
    node = only_user(norm.value, "Mul") if norm.scale is None else None
    if node is None or not _is_scale(other(node, norm.value), norm.x):
        return norm
    return replace(norm, value=node.outputs[0], scale=other(node, norm.value))


def _biased(norm: Norm) -> Norm:
    """The norm with the Add of a bias that follows its scale."""
    add = only_user(norm.value, "Add") if norm.centred and norm.scale is not None else None
    if add is None or not _is_scale(other(add, norm.value), norm.x):
        return norm
    return replace(norm, value=add.outputs[0], bias=other(add, norm.value))


def _is_scale(value: ir.Value, x: ir.Value) -> bool:
    """Whether a value is one number per feature, and is computed from initialisers alone."""
    shape, size = shape_of(value), shape_of(x)[-1]
    return math.prod(shape) == size and shape[-1:] == (size,) and _from_weights(value, DEPTH)


def _from_weights(value: ir.Value | None, depth: int) -> bool:
    if value is None or is_constant(value):
        return True
    node = value.producer()
    return node is not None and depth > 0 and all(_from_weights(v, depth - 1) for v in node.inputs)


# --- writing ------------------------------------------------------------------------------------------------


def _replace(editor: Editor, norm: Norm) -> None:
    """Put the op in the place of the norm's output; a norm without a scale gets ones."""
    dtype = norm.x.dtype
    assert dtype is not None and is_float(norm.x)
    size = shape_of(norm.x)[-1]
    scale = norm.scale
    if scale is None:
        scale = editor.constant(np.ones(size, dtype.numpy()), "ones")
    vectors = [editor.reshape(v, (size,)) if v is not None else None for v in (scale, norm.bias)]
    attrs = {"axis": -1, "epsilon": norm.epsilon}
    inputs = [norm.x, *vectors]
    editor.replace(norm.value, editor.op(norm.pattern, inputs, shape_of(norm.x), dtype, attrs))
