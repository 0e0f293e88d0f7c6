"""Ops of ONNX Runtime's domain `com.microsoft`, expanded to ONNX ops, one table for all of them.

The families stand in `microsoft_*.py`, the activations here. Expansions run while shapes are being bound, since ONNX's
shape inference knows nothing of these ops. docs/microsoft.md lists them all.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, shape_of
from onnxmesh.passes.normalise.microsoft_attention import ATTENTION_EXPANSIONS
from onnxmesh.passes.normalise.microsoft_bnb import BNB_EXPANSIONS
from onnxmesh.passes.normalise.microsoft_moe import MOE_EXPANSIONS
from onnxmesh.passes.normalise.microsoft_norms import NORM_EXPANSIONS, sum_of
from onnxmesh.passes.normalise.microsoft_plain import PLAIN_EXPANSIONS
from onnxmesh.passes.normalise.microsoft_products import PRODUCT_EXPANSIONS, scaled
from onnxmesh.passes.normalise.microsoft_quantised import QUANTISED_EXPANSIONS
from onnxmesh.passes.normalise.microsoft_state import STATE_EXPANSIONS

Expansion = Callable[[ir.Node, Builder], None]
"""Replaces the node through the builder."""

DOMAIN = "com.microsoft"


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


GENERATION = ("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch")


def refuse_generation(node: ir.Node, _: Builder) -> None:
    """Loops over a whole decoder.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        f"{label(node)} searches for tokens around a whole decoder, which is not supported",
        hint="compile the decoder that it holds, with its cache as inputs and outputs, and search outside",
        code="OM1303",
    )


ACTIVATION_EXPANSIONS: dict[str, Expansion] = {
    **dict.fromkeys(("Gelu", "BiasGelu"), gelu),
    "FastGelu": fast_gelu,
    "QuickGelu": quick_gelu,
    "ScaledSiLU": scaled_silu,
    "BiasAdd": bias_add,
    "BiasSplitGelu": bias_split_gelu,
    "GatedAdd": gated_add,
    "LinearAttentionGate": linear_attention_gate,
    **dict.fromkeys(GENERATION, refuse_generation),
}

EXPANSIONS: dict[tuple[str, str], Expansion] = {
    (DOMAIN, op): expansion
    for op, expansion in {
        **ACTIVATION_EXPANSIONS,
        **NORM_EXPANSIONS,
        **PRODUCT_EXPANSIONS,
        **MOE_EXPANSIONS,
        **PLAIN_EXPANSIONS,
        **ATTENTION_EXPANSIONS,
        **QUANTISED_EXPANSIONS,
        **BNB_EXPANSIONS,
        **STATE_EXPANSIONS,
    }.items()
}
