"""Layers of `com.microsoft` that carry a state from token to token: ONNX's ops of the same names, since opset 27."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, set_type, shape_of


def _require_defaults(node: ir.Node, **defaults: int) -> None:
    """Raise ModelError where an attribute is another number than ONNX's op stands for."""
    for name, default in defaults.items():
        given = node.attributes.get_int(name, default)
        if given != default:
            raise ModelError(
                f"{label(node)} has {name} = {given}, which is not supported",
                hint=f"export it with {name} = {default}",
                code="OM1303",
            )


def linear_attention(node: ir.Node, b: Builder) -> None:
    """LinearAttention over `[b, t, h * d]`; its second output is the state after the last token.

    Raises:
        ModelError: it holds a window of states, or has fewer heads of queries than of keys.
    """
    _require_defaults(node, state_window=0)
    heads, groups = (node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
    if heads % groups:
        raise ModelError(
            f"{label(node)} has {heads} heads of queries for {groups} of keys", hint="give a multiple", code="OM1304"
        )
    q, k, v = (present(node, i) for i in range(3))
    features = shape_of(v)[2] // groups
    kept = ("q_num_heads", "kv_num_heads", "scale", "update_rule")
    attributes = {name: node.attributes[name].value for name in kept if name in node.attributes}
    y, state = b.node("", "LinearAttention", node.inputs, attributes, 2).outputs
    set_type(y, dtype_of(q), (*shape_of(q)[:2], heads * features))
    past = optional(node, 3)
    kind = dtype_of(q if past is None else past)
    set_type(state, kind, (shape_of(q)[0], groups, shape_of(k)[2] // groups, features))
    b.replace(*[y, state][: len(node.outputs)])


def causal_conv(node: ir.Node, b: Builder) -> None:
    """CausalConvWithState over `[b, c, t]`; its second output is what the next token has to see.

    Raises:
        ModelError: it has several spatial dims, other layouts, or a window of states.
    """
    _require_defaults(node, ndim=1, dilation=1, channels_last=0, state_window=0)
    x, weight = present(node, 0), present(node, 1)
    activation = {"activation": node.attributes.get_string("activation", "none")}
    y, state = b.node("", "CausalConvWithState", node.inputs, activation, 2).outputs
    set_type(y, dtype_of(x), shape_of(x))
    set_type(state, dtype_of(x), (*shape_of(x)[:2], shape_of(weight)[2] - 1))
    b.replace(*[y, state][: len(node.outputs)])


STATE_EXPANSIONS = {"LinearAttention": linear_attention, "CausalConvWithState": causal_conv}
