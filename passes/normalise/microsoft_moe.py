"""Mixture of experts of `com.microsoft`: routing by ONNX ops, the experts' layers as an op of the normal form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, shape_of

ACTIVATIONS = ("relu", "gelu", "silu", "swiglu", "identity")
INTERLEAVED, HALVES = 1, 2
"""How one first layer holds the two of SwiGLU (`swiglu_fusion`)."""


def mixture_of_experts(node: ir.Node, b: Builder) -> None:
    """MoE: the sum of the best experts' results, weighed by the softmax of the router's numbers.

    Raises:
        ModelError: the activation is unknown, or the router is a sparse mixer.
    """
    if node.attributes.get_int("use_sparse_mixer", 0):
        raise ModelError(
            f"{label(node)} routes by a sparse mixer, which is not supported", hint="export it with a softmax router"
        )
    x = present(node, 0)
    shape = shape_of(x)
    tokens = x if len(shape) == 2 else b.reshape(x, shape[0] * shape[1], shape[2])
    weights, biases = (optional(node, 2), optional(node, 6)), (optional(node, 3), optional(node, 7))
    y = experts(
        node, b, tokens, gates(node, b), (present(node, 4), *_layers(node, b, weights, biases)), optional(node, 5)
    )
    b.replace(b.reshape(y, *shape))


def gates(node: ir.Node, b: Builder) -> ir.Value:
    """The weight of every expert for every token, `[t, e]`: 0 for all but the best `k`."""
    router = present(node, 1)
    count = b.constant(np.array([node.attributes.get_int("k", 1)], np.int64))
    chosen = b.node("", "TopK", [b.op("Softmax", router, axis=-1), count], {"axis": -1}, 2).outputs
    best = chosen[0]
    if node.attributes.get_int("normalize_routing_weights", 0):
        best = b.op("Div", best, b.op("ReduceSum", best, b.constant(np.array([1], np.int64)), keepdims=1))
    nothing = b.own("Expand", [b.constant(0, dtype_of(router))], shape_of(router))
    return b.op("ScatterElements", nothing, chosen[1], best, axis=1)


Layers = tuple[ir.Value, ir.Value, ir.Value | None, ir.Value | None, ir.Value | None]
"""The second layer, the first, and what the first is multiplied with; then the biases of these two."""


def _layers(
    node: ir.Node,
    b: Builder,
    weights: tuple[ir.Value | None, ir.Value | None],
    biases: tuple[ir.Value | None, ir.Value | None],
) -> tuple[ir.Value, ir.Value | None, ir.Value | None, ir.Value | None]:
    """The first layer and the one that it is multiplied with, and their biases, apart where they stand as one."""
    first, third = weights
    assert first is not None
    fusion = node.attributes.get_int("swiglu_fusion", 0)
    if node.attributes.get_string("activation_type", "relu") != "swiglu" or not fusion:
        return first, third, *biases
    (gate, linear), bias = _halves(b, first, fusion), biases[0]
    return gate, linear, *((None, None) if bias is None else _halves(b, bias, fusion))


def _halves(b: Builder, fused: ir.Value, fusion: int) -> tuple[ir.Value, ir.Value]:
    """The two layers of one that stand on every other row (1), or one after another (2)."""
    experts_, rows, *rest = shape_of(fused)
    if fusion == HALVES:
        return b.slice(fused, 1, 0, rows // 2), b.slice(fused, 1, rows // 2, rows)
    pairs = b.reshape(fused, experts_, rows // 2, 2, *rest)
    gate, linear = (b.reshape(b.slice(pairs, 2, i, i + 1), experts_, rows // 2, *rest) for i in range(2))
    return gate, linear


def experts(
    node: ir.Node, b: Builder, tokens: ir.Value, weights: ir.Value, layers: Layers, last_bias: ir.Value | None
) -> ir.Value:
    """The op of the normal form; the last bias, weighed by the gates, is a product of its own.

    Raises:
        ModelError: the activation is unknown.
    """
    second, first, third, first_bias, third_bias = layers
    name = node.attributes.get_string("activation_type", "relu") or ""
    if name not in ACTIVATIONS:
        raise ModelError(f"{label(node)} has the activation '{name}'", hint=f"known are {', '.join(ACTIVATIONS)}")
    if name == "swiglu" and third is None:
        raise ModelError(f"{label(node)} has SwiGLU without a third layer", hint="set swiglu_fusion, or give fc3")
    swiglu = {
        "alpha": node.attributes.get_float("activation_alpha", 1.0),
        "shift": node.attributes.get_float("activation_beta", 0.0),
        "limit": node.attributes.get_float("swiglu_limit", None),
    }
    attributes = {
        "activation": "swish" if name == "swiglu" else name,
        "density": node.attributes.get_int("k", 1) / shape_of(weights)[1],
        **(swiglu if name == "swiglu" else {}),
    }
    inputs = [tokens, weights, first, second, third, first_bias, third_bias]
    y = b.own("Experts", inputs, (shape_of(tokens)[0], shape_of(second)[1]), attributes)
    return y if last_bias is None else b.op("Add", y, b.op("MatMul", weights, last_bias))


MOE_EXPANSIONS = {"MoE": mixture_of_experts}
