"""Activations of `com.microsoft`, and sums that ONNX Runtime's optimiser fuses with them, expanded to ONNX's."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder, Expansion
from onnxmesh.passes.graph.infer import dtype_of, optional, present, shape_of
from onnxmesh.passes.normalise.microsoft.norms import sum_of
from onnxmesh.passes.normalise.microsoft.products import scaled


def gelu(node: ir.Node, b: Builder) -> None:
    """Gelu and BiasGelu."""
    b.replace(b.op("Gelu", sum_of(b, present(node, 0), optional(node, 1))))


def fast_gelu(node: ir.Node, b: Builder) -> None:
    """Gelu by tanh, after a bias where there is one."""
    b.replace(b.op("Gelu", sum_of(b, present(node, 0), optional(node, 1)), approximate="tanh"))


def quick_gelu(node: ir.Node, b: Builder) -> None:
    """`x * sigmoid(alpha x)`."""
    x, alpha = present(node, 0), node.attributes.get_float("alpha", 1.702)
    b.replace(b.op("Mul", x, b.op("Sigmoid", scaled(b, x, alpha))))


def scaled_silu(node: ir.Node, b: Builder) -> None:
    """`z * sigmoid(z)` of `z = scale x`; the scale is an input or an attribute."""
    x, given = present(node, 0), optional(node, 1)
    if given is None:
        z = scaled(b, x, node.attributes.get_float("alpha", 1.0))
    else:
        z = b.op("Mul", x, b.op("Cast", b.reshape(given), to=int(dtype_of(x))))
    b.replace(b.op("Mul", z, b.op("Sigmoid", z)))


def bias_add(node: ir.Node, b: Builder) -> None:
    """`x + bias + skip`."""
    b.replace(sum_of(b, *(present(node, i) for i in range(3))))


def bias_split_gelu(node: ir.Node, b: Builder) -> None:
    """The sum in two halves of the last dim: the first times Gelu of the second."""
    total = b.op("Add", present(node, 0), present(node, 1))
    axis, width = len(shape_of(total)) - 1, shape_of(total)[-1]
    left, right = (b.slice(total, axis, start, start + width // 2) for start in (0, width // 2))
    b.replace(b.op("Mul", left, b.op("Gelu", right)))


def gated_add(node: ir.Node, b: Builder) -> None:
    """`x + y * gate`."""
    b.replace(b.op("Add", present(node, 0), b.op("Mul", present(node, 1), present(node, 2))))


def linear_attention_gate(node: ir.Node, b: Builder) -> None:
    """Decay `scale * softplus(a + bias)`, in float32, and `sigmoid(b)`."""
    a, other = present(node, 0), optional(node, 3)
    wide = b.op("Cast", a, to=int(ir.DataType.FLOAT))
    decay = b.op("Mul", present(node, 2), b.op("Softplus", b.op("Add", wide, present(node, 1))))
    rate = None if other is None else b.op("Sigmoid", other)
    b.replace(b.op("Cast", decay, to=int(dtype_of(a))), *[rate][: len(node.outputs) - 1])


ACTIVATION_EXPANSIONS: dict[str, Expansion] = {
    **dict.fromkeys(("Gelu", "BiasGelu"), gelu),
    "FastGelu": fast_gelu,
    "QuickGelu": quick_gelu,
    "ScaledSiLU": scaled_silu,
    "BiasAdd": bias_add,
    "BiasSplitGelu": bias_split_gelu,
    "GatedAdd": gated_add,
    "LinearAttentionGate": linear_attention_gate,
}
