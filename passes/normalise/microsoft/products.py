"""Matrix products and convolutions of `com.microsoft`, with what ONNX Runtime's optimiser fuses to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, shape_of
from onnxmesh.passes.normalise.microsoft.norms import channels_first, channels_last

ACTIVATIONS: dict[str, dict[str, float]] = {
    **{name: {} for name in "Relu Sigmoid Tanh Softplus Softsign Abs Neg Exp Log Sqrt HardSwish".split()},
    "LeakyRelu": {"alpha": 0.01},
    "Elu": {"alpha": 1.0},
    "ThresholdedRelu": {"alpha": 1.0},
    "Selu": {"alpha": 1.6732632, "gamma": 1.0507010},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
}
"""The parameters of an activation in the order of `activation_params`, with ONNX's defaults."""


def activated(node: ir.Node, b: Builder, y: ir.Value) -> ir.Value:
    """`y` after the activation that the node's attributes name.

    Raises:
        ModelError: the activation is none of ONNX's.
    """
    name = node.attributes.get_string("activation", "") or ""
    if not name:
        return y
    if name == "Clip":
        low, high = _parameters(node, {"min": -np.inf, "max": np.inf}).values()
        return b.op("Clip", y, *(b.constant(limit, dtype_of(y)) for limit in (low, high)))
    if name not in ACTIVATIONS:
        known = ", ".join([*ACTIVATIONS, "Clip"])
        raise ModelError(f"{label(node)} has the activation '{name}'", hint=f"known are {known}", code="OM1303")
    return b.op(name, y, **_parameters(node, ACTIVATIONS[name]))


def _parameters(node: ir.Node, defaults: dict[str, float]) -> dict[str, float]:
    """Those of a list `activation_params`, or of attributes `activation_alpha` and the like."""
    listed: Sequence[float] = node.attributes.get_floats("activation_params", ()) or ()
    given = dict(zip(defaults, listed))
    named = {name: node.attributes.get_float(f"activation_{name}", default) for name, default in defaults.items()}
    return {**named, **given}


def scaled(b: Builder, x: ir.Value, by: float) -> ir.Value:
    """`x` times a number."""
    return x if by == 1.0 else b.op("Mul", x, b.constant(by, dtype_of(x)))


def fused_matmul(node: ir.Node, b: Builder) -> None:
    """FusedMatMul, TransposeMatMul, FusedMatMulActivation: MatMul of transposed inputs, times alpha, activated."""
    x, w = (_transposed(node, b, present(node, i), side) for i, side in enumerate("AB"))
    y = scaled(b, b.op("MatMul", x, w), node.attributes.get_float("alpha", 1.0))
    b.replace(activated(node, b, y))


def _transposed(node: ir.Node, b: Builder, x: ir.Value, side: str) -> ir.Value:
    rank = len(shape_of(x))
    perm = list(range(rank))
    if node.attributes.get_int(f"transBatch{side}", 0) and rank > 2:
        perm = [*perm[1:-1], 0, rank - 1]
    if node.attributes.get_int(f"trans{side}", 0) and rank > 1:
        perm[-2:] = perm[:-3:-1]
    return x if perm == sorted(perm) else b.transpose(x, *perm)


def fused_gemm(node: ir.Node, b: Builder) -> None:
    """Gemm, activated."""
    attributes = {name: node.attributes.get_int(name, 0) for name in ("transA", "transB")}
    factors = {name: node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")}
    y = b.op("Gemm", present(node, 0), present(node, 1), optional(node, 2), **attributes, **factors)
    b.replace(activated(node, b, y))


def gemm_fast_gelu(node: ir.Node, b: Builder) -> None:
    """MatMul, a bias, Gelu by tanh."""
    y, bias = b.op("MatMul", present(node, 0), present(node, 1)), optional(node, 2)
    b.replace(b.op("Gelu", y if bias is None else b.op("Add", y, bias), approximate="tanh"))


CONV = ("group", "strides", "dilations", "pads", "kernel_shape", "auto_pad")


def conv(node: ir.Node, b: Builder, *, last: bool = False) -> None:
    """FusedConv, NhwcConv, NhwcFusedConv: Conv, plus Z, activated; `last`: channels stand last but in the weight."""
    x, residual = present(node, 0), optional(node, 3)
    attributes = {name: node.attributes[name].value for name in CONV if name in node.attributes}
    y = b.op("Conv", channels_first(b, x) if last else x, present(node, 1), optional(node, 2), **attributes)
    y = channels_last(b, y) if last else y
    b.replace(activated(node, b, y if residual is None else b.op("Add", y, residual)))


def nhwc_conv(node: ir.Node, b: Builder) -> None:
    """A convolution of channels that stand last."""
    conv(node, b, last=True)


def nhwc_max_pool(node: ir.Node, b: Builder) -> None:
    """MaxPool of channels that stand last."""
    y = b.node("", "MaxPool", [channels_first(b, present(node, 0))], {k: a.value for k, a in node.attributes.items()})
    b.replace(channels_last(b, y.outputs[0]))


def cdist(node: ir.Node, b: Builder) -> None:
    """The distances of every row of a from every row of b: |a|^2 - 2 a b^T + |b|^2, never below 0.

    Raises:
        ModelError: the metric is another one.
    """
    metric = node.attributes.get_string("metric", "sqeuclidean")
    if metric not in ("sqeuclidean", "euclidean"):
        raise ModelError(
            f"{label(node)} has the metric '{metric}'", hint="known are 'sqeuclidean' and 'euclidean'", code="OM1303"
        )
    x, y = present(node, 0), present(node, 1)
    last = b.constant(np.array([1], np.int64))
    squares = [b.op("ReduceSum", b.op("Mul", side, side), last, keepdims=1) for side in (x, y)]
    product = scaled(b, b.op("MatMul", x, b.transpose(y, 1, 0)), -2.0)
    total = b.op("Add", b.op("Add", product, squares[0]), b.transpose(squares[1], 1, 0))
    total = b.op("Max", total, b.constant(0.0, dtype_of(total)))
    b.replace(total if metric == "sqeuclidean" else b.op("Sqrt", total))


PRODUCT_EXPANSIONS = {
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul", "FusedMatMulActivation"), fused_matmul),
    "FusedGemm": fused_gemm,
    "GemmFastGelu": gemm_fast_gelu,
    "FusedConv": conv,
    **dict.fromkeys(("NhwcConv", "NhwcFusedConv"), nhwc_conv),
    "NhwcMaxPool": nhwc_max_pool,
    "CDist": cdist,
}
