"""Attention of ONNX Runtime's ops in the normal form: masks in one, a sink, and the scores as an output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import DOMAIN, dtype_of, set_type, shape_of
from onnxmesh.passes.normalise.attention import attend
from onnxmesh.passes.normalise.microsoft.cache import Seen

QKV = tuple[ir.Value, ir.Value, ir.Value]


@dataclass(frozen=True)
class Softmax:
    """What an op does to its scores.

    Attributes:
        sink: one more score a head, which takes weight and has no value: `[heads]`.
    """

    scale: float
    softcap: float = 0.0
    sink: ir.Value | None = None


def attention_of(b: Builder, qkv: QKV, bias: ir.Value | None, seen: Seen, softmax: Softmax) -> ir.Value:
    """Attention `[b, h, s, e]` with an additive mask, and with what can be seen."""
    mask = both(b, seen.mask, bias)
    if softmax.sink is None:
        return attend(b, qkv, mask, seen.positions, scale=softmax.scale, softcap=softmax.softcap)
    return _with_sink(b, qkv, mask, seen, softmax, softmax.sink)


def both(b: Builder, visible: ir.Value | None, bias: ir.Value | None) -> ir.Value | None:
    """A boolean and an additive mask as one."""
    if visible is None or bias is None:
        return bias if visible is None else visible
    return b.op("Where", visible, bias, b.constant(-np.inf, dtype_of(bias)))


def _with_sink(b: Builder, qkv: QKV, mask: ir.Value | None, seen: Seen, softmax: Softmax, sink: ir.Value) -> ir.Value:
    """The attention times the part of the weight that its keys have: sigmoid(log-sum-exp of the scores - sink)."""
    q, _, v = qkv
    attributes = {"scale": softmax.scale, "softcap": softmax.softcap, "masked_row": "zero"}
    inputs = [*qkv, mask, *(seen.positions or ())]
    out, highest, total = b.node(DOMAIN, "AttentionBlock", inputs, attributes, 3).outputs
    rows = shape_of(q)[:3]
    set_type(out, q.dtype, (*rows, shape_of(v)[3]))
    for value in (highest, total):
        set_type(value, ir.DataType.FLOAT, (*rows, 1))
    scores = b.op("Add", highest, b.op("Log", total))
    beside = b.reshape(b.op("Cast", sink, to=int(ir.DataType.FLOAT)), 1, shape_of(sink)[0], 1, 1)
    part = b.op("Sigmoid", b.op("Sub", scores, beside))
    return b.op("Mul", out, b.op("Cast", part, to=int(dtype_of(q))))


def scores_of(b: Builder, qkv: QKV, bias: ir.Value | None, seen: Seen, softmax: Softmax, hidden: float) -> ir.Value:
    """The scores `[b, h, s, t]` before the softmax; what cannot be seen is `hidden`."""
    q, k, _ = qkv
    (batch, heads, _, width), (_, groups, keys, _) = shape_of(q), shape_of(k)
    if groups < heads:
        apart = b.reshape(k, batch, groups, 1, keys, width)
        k = b.reshape(
            b.own("Expand", [apart], (batch, groups, heads // groups, keys, width)), batch, heads, keys, width
        )
    scores = b.op("MatMul", b.op("Mul", q, b.constant(softmax.scale, dtype_of(q))), b.transpose(k, 0, 1, 3, 2))
    if softmax.softcap:
        cap = b.constant(softmax.softcap, dtype_of(q))
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    if bias is not None:
        scores = b.op("Add", scores, bias)
    for visible in _conditions(b, seen):
        scores = b.op("Where", visible, scores, b.constant(hidden, dtype_of(q)))
    return scores


def _conditions(b: Builder, seen: Seen) -> list[ir.Value]:
    found = [] if seen.mask is None else [seen.mask]
    if seen.positions is not None:
        query, key = seen.positions
        found.append(b.op("LessOrEqual", b.reshape(key, 1, shape_of(key)[0]), b.reshape(query, shape_of(query)[0], 1)))
    return found


def weights_of(b: Builder, scores: ir.Value, sink: ir.Value | None) -> ir.Value:
    """The softmax of the scores, which a sink takes part of."""
    if sink is None:
        return b.op("Softmax", scores, axis=-1)
    batch, heads, queries, keys = shape_of(scores)
    column = b.own("Expand", [b.reshape(sink, 1, heads, 1, 1)], (batch, heads, queries, 1))
    return b.slice(b.op("Softmax", b.op("Concat", scores, column, axis=3), axis=-1), 3, 0, keys)


def scale_of(node: ir.Node, width: int) -> float:
    """The attribute `scale`; one over the root of the head's width where it is absent or 0."""
    given = node.attributes.get_float("scale", 0.0)
    return float(given) if given else 1.0 / math.sqrt(width)
