"""Ops of ONNX Runtime's domain `com.microsoft`, expanded to ONNX ops: activations, normalisations, matmuls.

The attention family is in `microsoft_attention.py`. Expansions run while shapes are being bound, since ONNX's
shape inference knows nothing of these ops.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, optional, present, shape_of
from onnxmesh.passes.normalise.microsoft_attention import ATTENTION_EXPANSIONS

Expansion = Callable[[ir.Node, Builder], None]
"""Replaces the node through the builder."""

DOMAIN = "com.microsoft"


def layer_norm(node: ir.Node, b: Builder) -> None:
    """SimplifiedLayerNormalization: RMSNormalization; its second output, 1 / rms, is not used in inference."""
    attributes = {
        "axis": node.attributes.get_int("axis", -1),
        "epsilon": node.attributes.get_float("epsilon", 1e-5),
    }
    b.replace(b.op("RMSNormalization", present(node, 0), present(node, 1), **attributes), None)


def skip_simplified_layer_norm(node: ir.Node, b: Builder) -> None:
    """The sum of input, skip and bias, then RMSNormalization."""
    total = _sum(b, present(node, 0), present(node, 1), optional(node, 3))
    y = b.op("RMSNormalization", total, present(node, 2), axis=-1, epsilon=_epsilon(node))
    b.replace(y, None, None, total)


def skip_layer_norm(node: ir.Node, b: Builder) -> None:
    """The sum of input, skip and bias, then LayerNormalization."""
    total = _sum(b, present(node, 0), present(node, 1), optional(node, 4))
    scale, shift = present(node, 2), optional(node, 3)
    y = b.op("LayerNormalization", total, scale, shift, axis=-1, epsilon=_epsilon(node))
    b.replace(y, None, None, total)


def _epsilon(node: ir.Node) -> float:
    return float(node.attributes.get_float("epsilon", 1e-12))


def _sum(b: Builder, x: ir.Value, *more: ir.Value | None) -> ir.Value:
    for value in more:
        x = x if value is None else b.op("Add", x, value)
    return x


def gelu(node: ir.Node, b: Builder) -> None:
    """Gelu and BiasGelu."""
    b.replace(b.op("Gelu", _sum(b, present(node, 0), optional(node, 1))))


def fast_gelu(node: ir.Node, b: Builder) -> None:
    """Gelu by tanh, after a bias where there is one."""
    b.replace(b.op("Gelu", _sum(b, present(node, 0), optional(node, 1)), approximate="tanh"))


def quick_gelu(node: ir.Node, b: Builder) -> None:
    """`x * sigmoid(alpha x)`."""
    x, alpha = present(node, 0), node.attributes.get_float("alpha", 1.702)
    scaled = x if alpha == 1.0 else b.op("Mul", x, b.constant(alpha, dtype_of(x)))
    b.replace(b.op("Mul", x, b.op("Sigmoid", scaled)))


def bias_add(node: ir.Node, b: Builder) -> None:
    """`x + bias + skip`."""
    b.replace(_sum(b, *(present(node, i) for i in range(3))))


def fused_matmul(node: ir.Node, b: Builder) -> None:
    """MatMul of transposed inputs, times alpha."""
    x, w = (_transposed(node, b, present(node, i), side) for i, side in enumerate("AB"))
    y, alpha = b.op("MatMul", x, w), node.attributes.get_float("alpha", 1.0)
    b.replace(y if alpha == 1.0 else b.op("Mul", y, b.constant(alpha, dtype_of(y))))


def _transposed(node: ir.Node, b: Builder, x: ir.Value, side: str) -> ir.Value:
    rank = len(shape_of(x))
    perm = list(range(rank))
    if node.attributes.get_int(f"transBatch{side}", 0) and rank > 2:
        perm = [*perm[1:-1], 0, rank - 1]
    if node.attributes.get_int(f"trans{side}", 0) and rank > 1:
        perm[-2:] = perm[:-3:-1]
    return x if perm == sorted(perm) else b.transpose(x, *perm)


EXPANSIONS: dict[tuple[str, str], Expansion] = {
    (DOMAIN, op): expansion
    for op, expansion in {
        "SimplifiedLayerNormalization": layer_norm,
        "SkipSimplifiedLayerNormalization": skip_simplified_layer_norm,
        "SkipLayerNormalization": skip_layer_norm,
        "Gelu": gelu,
        "BiasGelu": gelu,
        "FastGelu": fast_gelu,
        "QuickGelu": quick_gelu,
        "BiasAdd": bias_add,
        "FusedMatMul": fused_matmul,
        **ATTENTION_EXPANSIONS,
    }.items()
}
