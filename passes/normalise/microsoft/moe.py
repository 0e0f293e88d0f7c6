"""Mixture of experts of `com.microsoft`: routing by ONNX ops, the experts' layers as an op of the normal form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, shape_of
from onnxmesh.passes.normalise.microsoft.quantised import unpacked

ACTIVATIONS = ("relu", "gelu", "silu", "swiglu", "identity")
INTERLEAVED, HALVES = 1, 2
"""How one first layer holds the two of SwiGLU (`swiglu_fusion`)."""


def mixture_of_experts(node: ir.Node, b: Builder) -> None:
    """MoE: the sum of the best experts' results, weighed by the softmax of the router's numbers.

    Raises:
        ModelError: the activation is unknown, or the router is a sparse mixer.
    """
    normalised = bool(node.attributes.get_int("normalize_routing_weights", 0))
    weights = gates(node, b, b.op("Softmax", present(node, 1), axis=-1), None, normalised=normalised)
    first, second, third = present(node, 2), present(node, 4), optional(node, 6)
    biases = (optional(node, 3), optional(node, 5), optional(node, 7))
    _mixture(node, b, weights, (first, second, third), biases)


def quantised_mixture_of_experts(node: ir.Node, b: Builder) -> None:
    """QMoE: MoE of weights of 2, 4 or 8 bits, which are dequantised first: by rows, or by blocks of them.

    As ONNX Runtime's CPU kernel has it, the gates sum up to 1, unless they are numbers of their own (`router_weights`).

    Raises:
        ModelError: as for MoE, or the weights are no integers.
    """
    kind = node.attributes.get_string("quant_type", "int")
    if kind != "int" or node.attributes.get_int("weights_prepacked", -1) > 0:
        raise ModelError(
            f"{label(node)} has weights of quant_type '{kind}', or prepacked ones, which is not supported",
            hint="export it with integer weights as the quantiser gives them (weights_prepacked = 0)",
            code="OM1303",
        )
    given = optional(node, 14)
    normalised = given is None or bool(node.attributes.get_int("normalize_routing_weights", 0))
    weights = gates(node, b, b.op("Softmax", present(node, 1), axis=-1), given, normalised=normalised)
    first, second, third = (_dequantised(node, b, i) for i in range(3))
    assert first is not None and second is not None
    _mixture(node, b, weights, (first, second, third), (optional(node, 4), optional(node, 7), optional(node, 10)))


def _dequantised(node: ir.Node, b: Builder, layer: int) -> ir.Value | None:
    """One layer of all experts, `[e, n, k]`: `(number - zero) * scale`, where a row has one of each, or several."""
    packed, dtype = optional(node, 2 + 3 * layer), dtype_of(present(node, 0))
    if packed is None:
        return None
    scale, zeros = present(node, 3 + 3 * layer), optional(node, 11 + layer)
    bits = node.attributes.get_int(
        f"fc{layer + 1}_expert_weight_bits", node.attributes.get_int("expert_weight_bits", 4)
    )
    numbers = unpacked(b, packed, bits)
    count, rows, columns = shape_of(numbers)
    blocks = shape_of(scale)[2] if len(shape_of(scale)) == 3 else 1
    middle = b.constant(1 << (bits - 1), dtype)
    if zeros is not None:
        middle = unpacked(b, zeros, bits)
        last = len(shape_of(middle)) - 1
        middle = b.slice(middle, last, 0, blocks if last == 2 else rows)
        middle = b.reshape(b.op("Cast", middle, to=int(dtype)), count, rows, blocks, 1)
    apart = b.reshape(b.op("Cast", numbers, to=int(dtype)), count, rows, blocks, columns // blocks)
    scale = b.reshape(b.op("Cast", scale, to=int(dtype)), count, rows, blocks, 1)
    return b.reshape(b.op("Mul", b.op("Sub", apart, middle), scale), count, rows, columns)


def gates(node: ir.Node, b: Builder, router: ir.Value, given: ir.Value | None, *, normalised: bool) -> ir.Value:
    """The weight of every expert for every token, `[t, e]`: 0 for all but the best `k`.

    The weights are the router's numbers, or others that are `given`, and sum up to 1 where they are normalised.
    """
    count = b.constant(np.array([node.attributes.get_int("k", 1)], np.int64))
    chosen = b.node("", "TopK", [router, count], {"axis": -1}, 2).outputs
    best = chosen[0] if given is None else b.op("GatherElements", given, chosen[1], axis=1)
    if normalised:
        best = b.op("Div", best, b.op("ReduceSum", best, b.constant(np.array([1], np.int64)), keepdims=1))
    nothing = b.own("Expand", [b.constant(0, dtype_of(router))], shape_of(router))
    return b.op("ScatterElements", nothing, chosen[1], best, axis=1)


Parts = tuple[ir.Value, ir.Value, ir.Value | None]
Optional3 = tuple[ir.Value | None, ir.Value | None, ir.Value | None]


def _mixture(node: ir.Node, b: Builder, weights: ir.Value, layers: Parts, biases: Optional3) -> None:
    """The experts' layers, and their biases, on the tokens of any batch."""
    if node.attributes.get_int("use_sparse_mixer", 0):
        raise ModelError(
            f"{label(node)} routes by a sparse mixer, which is not supported",
            hint="export it with a softmax router",
            code="OM1303",
        )
    x = present(node, 0)
    shape = shape_of(x)
    tokens = x if len(shape) == 2 else b.reshape(x, shape[0] * shape[1], shape[2])
    apart = _layers(node, b, (layers[0], layers[2]), (biases[0], biases[2]))
    b.replace(b.reshape(experts(node, b, tokens, weights, (layers[1], *apart), biases[1]), *shape))


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
        raise ModelError(
            f"{label(node)} has the activation '{name}'", hint=f"known are {', '.join(ACTIVATIONS)}", code="OM1303"
        )
    if name == "swiglu" and third is None:
        raise ModelError(
            f"{label(node)} has SwiGLU without a third layer", hint="set swiglu_fusion, or give fc3", code="OM1311"
        )
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


MOE_EXPANSIONS = {"MoE": mixture_of_experts, "QMoE": quantised_mixture_of_experts}
