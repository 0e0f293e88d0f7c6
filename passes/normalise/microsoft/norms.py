"""The normalisations of `com.microsoft`, expanded to ONNX's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, shape_of


def used(node: ir.Node, index: int) -> bool:
    """Whether anybody reads an output."""
    output = node.outputs[index] if index < len(node.outputs) else None
    return output is not None and bool(output.uses() or output.is_graph_output())


def sum_of(b: Builder, x: ir.Value, *more: ir.Value | None) -> ir.Value:
    """The sum of `x` and of those that are there."""
    for value in more:
        x = x if value is None else b.op("Add", x, value)
    return x


# --- layer norm and RMS norm --------------------------------------------------------------------------------


def simplified_layer_norm(node: ir.Node, b: Builder) -> None:
    """SimplifiedLayerNormalization: RMSNormalization; its second output is 1 / rms."""
    x, axis = present(node, 0), node.attributes.get_int("axis", -1)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    y = b.op("RMSNormalization", x, present(node, 1), axis=axis, epsilon=epsilon)
    b.replace(y, *[_inverse_rms(b, x, axis, epsilon) if used(node, 1) else None][: len(node.outputs) - 1])


def _inverse_rms(b: Builder, x: ir.Value, axis: int, epsilon: float) -> ir.Value:
    """1 / sqrt(mean(x^2) + epsilon) over the dims from `axis` on, in float32."""
    rank = len(shape_of(x))
    axes = list(range(axis % rank, rank))
    wide = b.cast(x, ir.DataType.FLOAT)
    shape = (*shape_of(x)[: axes[0]], *[1] * len(axes))
    power = b.own("ReduceMean", [b.op("Mul", wide, wide)], shape, {"axes": axes, "keepdims": 1})
    return b.op("Reciprocal", b.op("Sqrt", b.op("Add", power, b.constant(epsilon, ir.DataType.FLOAT))))


def skip_simplified_layer_norm(node: ir.Node, b: Builder) -> None:
    """The sum of input, skip and bias, then RMSNormalization; outputs as those of `skip_layer_norm`."""
    total = sum_of(b, present(node, 0), present(node, 1), optional(node, 3))
    y = b.op("RMSNormalization", total, present(node, 2), axis=-1, epsilon=_epsilon(node))
    if used(node, 1):
        raise ModelError(
            f"{label(node)} gives out a mean, which RMS normalization has none of",
            hint="drop that output",
            code="OM1302",
        )
    inverse = _inverse_rms(b, total, -1, _epsilon(node)) if used(node, 2) else None
    b.replace(y, *[None, inverse, total][: len(node.outputs) - 1])


def skip_layer_norm(node: ir.Node, b: Builder) -> None:
    """The sum of input, skip and bias, then LayerNormalization: also its mean, 1 / standard deviation, and the sum."""
    total = sum_of(b, present(node, 0), present(node, 1), optional(node, 4))
    scale, shift = present(node, 2), optional(node, 3)
    attributes = {"axis": -1, "epsilon": _epsilon(node)}
    count = 3 if used(node, 1) or used(node, 2) else 1
    made = b.node("", "LayerNormalization", [total, scale, shift], attributes, count).outputs
    statistics: list[ir.Value | None] = list(made[1:]) or [None, None]
    b.replace(made[0], *[*statistics, total][: len(node.outputs) - 1])


def _epsilon(node: ir.Node) -> float:
    return float(node.attributes.get_float("epsilon", 1e-12))


def embed_layer_norm(node: ir.Node, b: Builder) -> None:
    """The sum of the embeddings of words, positions and segments, then LayerNormalization.

    Its second output is the number of tokens that the mask keeps in each sequence (0 where there is no mask), its third
    the sum.
    """
    positions, segments = optional(node, 8) or _positions(node, b), optional(node, 1)
    total = b.op("Gather", present(node, 2), present(node, 0), axis=0)
    total = b.op("Add", total, b.op("Gather", present(node, 3), positions, axis=0))
    if segments is not None:
        total = b.op("Add", total, b.op("Gather", present(node, 4), segments, axis=0))
    _normalised_sum(node, b, total, present(node, 5), present(node, 6))


def quantised_embed_layer_norm(node: ir.Node, b: Builder) -> None:
    """QEmbedLayerNormalization: the rows of tables of 8 bits, and the scale and shift, are dequantised first."""
    rows = []
    for i, at in enumerate((present(node, 0), _positions(node, b), optional(node, 1))):
        if at is not None:
            rows.append(_dequantised(node, b, b.op("Gather", present(node, 2 + i), at, axis=0), i))
    scale, shift = (_dequantised(node, b, present(node, 5 + i), 3 + i) for i in range(2))
    _normalised_sum(node, b, sum_of(b, *rows), scale, shift)


def _dequantised(node: ir.Node, b: Builder, x: ir.Value, index: int) -> ir.Value:
    scale, zero = (b.reshape(present(node, first + index)) for first in (8, 13))
    return b.op("DequantizeLinear", x, scale, zero)


def _positions(node: ir.Node, b: Builder) -> ir.Value:
    """The positions of the tokens, counted from 0: `[1, s]`."""
    return b.constant(np.arange(shape_of(present(node, 0))[1], dtype=np.int64).reshape(1, -1))


def _normalised_sum(node: ir.Node, b: Builder, total: ir.Value, scale: ir.Value, shift: ir.Value) -> None:
    y = b.op("LayerNormalization", total, scale, shift, axis=-1, epsilon=_epsilon(node))
    count = _kept(b, optional(node, 7), shape_of(present(node, 0))[0]) if used(node, 1) else None
    b.replace(y, *[count, total][: len(node.outputs) - 1])


def _kept(b: Builder, mask: ir.Value | None, batch: int) -> ir.Value:
    if mask is None:
        return b.constant(np.zeros(batch, np.int32))
    return b.op("ReduceSum", mask, b.constant(np.array([1], np.int64)), keepdims=0)


# --- group norm ---------------------------------------------------------------------------------------------


def group_norm(node: ir.Node, b: Builder) -> None:
    """GroupNorm: GroupNormalization of channels that stand last (by default), and SiLU where it asks."""
    b.replace(_grouped(node, b, present(node, 0)))


def skip_group_norm(node: ir.Node, b: Builder) -> None:
    """The sum of x, skip and bias, then GroupNorm; the sum is the second output."""
    x, skip, bias = present(node, 0), present(node, 3), optional(node, 4)
    rank, last = len(shape_of(x)), _channels_last(node)
    if len(shape_of(skip)) == 2:
        batch, channels = shape_of(skip)
        ones = [1] * (rank - 2)
        skip = b.reshape(skip, batch, *((*ones, channels) if last else (channels, *ones)))
    if bias is not None and not last:
        bias = b.reshape(bias, shape_of(bias)[0], *[1] * (rank - 2))
    total = sum_of(b, x, skip, bias)
    b.replace(_grouped(node, b, total), *[total][: len(node.outputs) - 1])


def _channels_last(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("channels_last", 1))


def _grouped(node: ir.Node, b: Builder, x: ir.Value) -> ir.Value:
    attributes = {
        "num_groups": node.attributes.get_int("groups", 1),
        "epsilon": node.attributes.get_float("epsilon", 1e-5),
    }
    rank, dtype = len(shape_of(x)), dtype_of(x)
    scale, shift = (b.cast(present(node, i), dtype) for i in (1, 2))
    last = _channels_last(node)
    y = channels_first(b, x) if last else x
    y = b.node("", "GroupNormalization", [y, scale, shift], attributes).outputs[0]
    if node.attributes.get_int("activation", 0):
        y = b.op("Mul", y, b.op("Sigmoid", y))
    return channels_last(b, y) if last and rank > 2 else y


def channels_first(b: Builder, x: ir.Value) -> ir.Value:
    """`[n, ..., c]` as `[n, c, ...]`."""
    rank = len(shape_of(x))
    return b.transpose(x, 0, rank - 1, *range(1, rank - 1))


def channels_last(b: Builder, x: ir.Value) -> ir.Value:
    """`[n, c, ...]` as `[n, ..., c]`."""
    return b.transpose(x, 0, *range(2, len(shape_of(x))), 1)


# --- what hybrid decoders have ------------------------------------------------------------------------------


def gated_rms_norm(node: ir.Node, b: Builder) -> None:
    """GatedRMSNorm: RMSNormalization of each run as long as the scale, times silu or sigmoid of the gate."""
    x, scale, gate = (present(node, i) for i in range(3))
    shape, width = shape_of(x), shape_of(scale)[0]
    rows = b.reshape(x, *shape[:-1], shape[-1] // width, width)
    y = b.op("RMSNormalization", rows, scale, axis=-1, epsilon=node.attributes.get_float("epsilon", 1e-5))
    open_ = b.op("Sigmoid", gate)
    if node.attributes.get_string("activation", "silu") != "sigmoid":
        open_ = b.op("Mul", gate, open_)
    b.replace(b.op("Mul", b.reshape(y, *shape), open_))


def branchwise_rms_norm(node: ir.Node, b: Builder) -> None:
    """BranchwiseRMSNorm: RMSNormalization of each of the branches `[c, h]` that the last dims hold."""
    x, scale, branches = present(node, 0), optional(node, 1), node.attributes.get_int("num_branches", 0)
    shape = shape_of(x)
    rows = b.reshape(x, *shape[:-1], branches, shape[-1] // branches) if branches else x
    count, width = shape_of(rows)[-2:]
    ones = b.constant(np.ones(width), dtype_of(x))
    y = b.op("RMSNormalization", rows, ones, axis=-1, epsilon=node.attributes.get_float("epsilon", 1e-6))
    if scale is not None:
        scale = b.cast(scale, dtype_of(x))
        y = b.op("Mul", y, scale if shape_of(scale) == (width,) else b.reshape(scale, count, width))
    b.replace(b.reshape(y, *shape) if branches else y)


NORM_EXPANSIONS = {
    "SimplifiedLayerNormalization": simplified_layer_norm,
    "SkipSimplifiedLayerNormalization": skip_simplified_layer_norm,
    "SkipLayerNormalization": skip_layer_norm,
    "EmbedLayerNormalization": embed_layer_norm,
    "QEmbedLayerNormalization": quantised_embed_layer_norm,
    "GroupNorm": group_norm,
    "SkipGroupNorm": skip_group_norm,
    "GatedRMSNorm": gated_rms_norm,
    "BranchwiseRMSNorm": branchwise_rms_norm,
}
