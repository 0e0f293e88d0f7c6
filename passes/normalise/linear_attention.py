"""The layers of models with a state instead of a cache: LinearAttention, and the convolution that stands before it."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import DOMAIN, dtype_of, optional, present, set_type, shape_of
from onnxmesh.passes.normalise.attention import split_heads
from onnxmesh.passes.normalise.ops import Rule

GATED, DELTA = ("gated", "gated_delta"), ("delta", "gated_delta")
"""The update rules that have a decay, and those that have a rate."""


def linear_attention(node: ir.Node, b: Builder) -> bool:
    """Heads as dims; the update rule is said by which of decay and beta there are."""
    heads, groups = (node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
    q, k, v = (present(node, i) for i in range(3))
    batch, steps, width = shape_of(q)
    size, rule = width // heads, node.attributes.get_string("update_rule", "gated_delta")
    q = b.transpose(b.reshape(q, batch, steps, groups, heads // groups, size), 0, 2, 3, 1, 4)
    k, v = split_heads(b, k, groups), split_heads(b, v, groups)
    decay = split_heads(b, present(node, 4), groups) if rule in GATED else None
    beta = split_heads(b, present(node, 5), shape_of(present(node, 5))[2]) if rule in DELTA else None
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(size)
    past = optional(node, 3)
    made = b.node(DOMAIN, "LinearAttention", [q, k, v, past, decay, beta], {"scale": scale}, 2)
    out, state = made.outputs
    features = shape_of(v)[3]
    set_type(out, dtype_of(q), (batch, groups, heads // groups, steps, features))
    set_type(state, dtype_of(node.outputs[1] if past is None else past), (batch, groups, size, features))
    joined = b.reshape(b.transpose(out, 0, 3, 1, 2, 4), batch, steps, heads * features)
    b.replace(*[joined, state][: len(node.outputs)])
    return True


def causal_conv(node: ir.Node, b: Builder) -> bool:
    """CausalConvWithState: the state or zeros before the input, a convolution of each channel, an activation."""
    x, weight, past = present(node, 0), present(node, 1), optional(node, 3)
    batch, channels, length = shape_of(x)
    before = shape_of(weight)[2] - 1
    if past is not None:
        x = b.op("Concat", past, x, axis=2)
    elif before:
        x = b.own("Pad", [x], (batch, channels, before + length), {"pads": [0, 0, before, 0, 0, 0], "mode": "constant"})
    y = b.op("Conv", x, weight, optional(node, 2), group=channels)
    if node.attributes.get_string("activation", "none") != "none":
        y = b.op("Swish", y)
    b.replace(*[y, b.slice(x, 2, length, length + before)][: len(node.outputs)])
    return True


LINEAR_ATTENTION_RULES: dict[str, Rule] = {"LinearAttention": linear_attention, "CausalConvWithState": causal_conv}
