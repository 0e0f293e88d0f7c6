"""Attention that gives out its scores: products and a softmax, since the op of the normal form never holds all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, shape_of


@dataclass(frozen=True)
class Scoring:
    """What an Attention of ONNX does to its scores, and which of them it gives out.

    Attributes:
        mode: 0 the scaled products, 1 after the soft cap, 2 with all masks, 3 the probabilities.
        precision: what the softmax computes in; None for the element type of the queries.
    """

    scale: float
    softcap: float
    mode: int
    precision: ir.DataType | None


def attend_with_scores(
    b: Builder,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value | None,
    visible: Sequence[ir.Value],
    how: Scoring,
) -> tuple[ir.Value, ir.Value]:
    """The attention [b, h, s, e] and the scores [b, h, s, t]; a row that sees nothing is zero in both.

    q [b, h, s, d], k [b, g, t, d], v [b, g, t, e]; `bias`, additive, and each of `visible`, boolean, broadcast to the
    scores.
    """
    q, k, v = qkv
    dtype = dtype_of(q)
    products = _product(b, b.op("Mul", q, b.constant(how.scale, dtype)), b.transpose(k, 0, 1, 3, 2))
    capped = products
    if how.softcap:
        cap = b.constant(how.softcap, dtype)
        capped = b.op("Mul", b.op("Tanh", b.op("Div", products, cap)), cap)
    masked = capped if bias is None else b.op("Add", capped, bias)
    if visible:
        shown = reduce(lambda one, other: b.op("And", one, other), visible)
        masked = b.op("Where", shown, masked, b.constant(-math.inf, dtype))
    probabilities = _softmax(b, masked, how.precision or dtype, guarded=bias is not None or bool(visible))
    return _product(b, probabilities, v), (products, capped, masked, probabilities)[how.mode]


def _softmax(b: Builder, scores: ir.Value, precision: ir.DataType, *, guarded: bool) -> ir.Value:
    """Probabilities of the scores' element type; rows of minus infinity alone are zero where `guarded`."""
    dtype = dtype_of(scores)
    scores = b.cast(scores, precision)
    result = b.op("Softmax", scores, axis=3)
    if guarded:
        rows = (*shape_of(scores)[:3], 1)
        highest = b.own("ReduceMax", [scores], rows, {"axes": [3], "keepdims": 1})
        sees = b.op("Greater", highest, b.constant(-math.inf, precision))
        result = b.op("Where", sees, result, b.constant(0, precision))
    return b.cast(result, dtype)


def _product(b: Builder, x: ir.Value, y: ir.Value) -> ir.Value:
    """`[b, h, s, i]` times `[b, g, i, j]`, in which a head of y serves h / g heads of x that stand together."""
    batch, heads, rows, inner = shape_of(x)
    groups = shape_of(y)[1]
    if heads == groups:
        return b.op("MatMul", x, y)
    joined = b.reshape(x, batch, groups, heads // groups * rows, inner)
    return b.reshape(b.op("MatMul", joined, y), batch, heads, rows, shape_of(y)[3])
