"""Quantised ops of ONNX Runtime's domain `com.microsoft`, expanded to ONNX ops.

Products are MatMulInteger and ConvInteger, whose sums are exact; everything else is dequantised, computed and
quantised again, as ONNX Runtime's own kernels do it up to the last rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder, Expansion
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, set_type, shape_of
from onnxmesh.passes.normalise.microsoft.attention import ATTENTION_EXPANSIONS
from onnxmesh.passes.normalise.quantised import along, as_float, qlinear_conv_of, requantised, scaled


def _dequantised(b: Builder, x: ir.Value, scale: ir.Value, zero: ir.Value | None, **attributes: Any) -> ir.Value:
    return b.op("DequantizeLinear", x, _number(b, scale), None if zero is None else _number(b, zero), **attributes)


def _quantised(b: Builder, x: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
    return b.op("QuantizeLinear", x, _number(b, scale), None if zero is None else _number(b, zero))


def _number(b: Builder, value: ir.Value) -> ir.Value:
    """A vector of one number as a scalar."""
    return b.reshape(value) if shape_of(value) == (1,) else value


def _kept(node: ir.Node, *names: str) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items() if name in names}


# --- elementwise --------------------------------------------------------------------------------------------


def _binary(op: str) -> Expansion:
    """QLinearAdd, QLinearMul: a, its scale and zero point, b's, the result's."""

    def expand(node: ir.Node, b: Builder) -> None:
        x, y = (_dequantised(b, present(node, i), present(node, i + 1), optional(node, i + 2)) for i in (0, 3))
        b.replace(_quantised(b, b.op(op, x, y), present(node, 6), optional(node, 7)))

    return expand


def _unary(op: str, *names: str) -> Expansion:
    """x, its scale and zero point, the result's."""

    def expand(node: ir.Node, b: Builder) -> None:
        b.replace(_wrapped(node, b, lambda x: b.op(op, x, **_kept(node, *names))))

    return expand


def _wrapped(node: ir.Node, b: Builder, function: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """`function` of input 0 dequantised, quantised again; inputs 1 to 4 are scales and zero points."""
    x = _dequantised(b, present(node, 0), present(node, 1), optional(node, 2))
    return _quantised(b, function(x), present(node, 3), optional(node, 4))


def where(node: ir.Node, b: Builder) -> None:
    """QLinearWhere."""
    x, y = (_dequantised(b, *(present(node, i + k) for k in range(3))) for i in (1, 4))
    b.replace(_quantised(b, b.op("Where", present(node, 0), x, y), present(node, 7), present(node, 8)))


def concat(node: ir.Node, b: Builder) -> None:
    """QLinearConcat: after the result's scale and zero point those of every input stand behind it."""
    parts = [_dequantised(b, *(present(node, i + k) for k in range(3))) for i in range(2, len(node.inputs), 3)]
    whole = b.op("Concat", *parts, axis=node.attributes.get_int("axis", 0))
    b.replace(_quantised(b, whole, present(node, 0), present(node, 1)))


# --- along axes ---------------------------------------------------------------------------------------------


def softmax(node: ir.Node, b: Builder) -> None:
    """QLinearSoftmax; before opset 13 all dims from the axis on are one."""

    def function(x: ir.Value) -> ir.Value:
        shape = shape_of(x)
        axis = node.attributes.get_int("axis", -1) % len(shape)
        if node.attributes.get_int("opset", 13) >= 13 or axis == len(shape) - 1:
            return b.op("Softmax", x, axis=axis)
        flat = b.reshape(x, *shape[:axis], prod(shape[axis:]))
        return b.reshape(b.op("Softmax", flat, axis=axis), *shape)

    b.replace(_wrapped(node, b, function))


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")


def _pool(op: str) -> Expansion:
    """QLinearAveragePool, QLinearGlobalAveragePool; with `channels_last` of [n, spatial..., c]."""

    def expand(node: ir.Node, b: Builder) -> None:
        def function(x: ir.Value) -> ir.Value:
            y = b.op(op, _channels(node, b, x, first=True), **_kept(node, *_POOL))
            return _channels(node, b, y, first=False)

        b.replace(_wrapped(node, b, function))

    return expand


def _channels(node: ir.Node, b: Builder, x: ir.Value, *, first: bool) -> ir.Value:
    """With `channels_last`, [n, spatial..., c] as [n, c, spatial...], or back."""
    if not node.attributes.get_int("channels_last", 0):
        return x
    last = len(shape_of(x)) - 1
    return b.transpose(x, 0, last, *range(1, last)) if first else b.transpose(x, 0, *range(2, last + 1), 1)


def conv(node: ir.Node, b: Builder) -> None:
    """As ONNX's QLinearConv, also with the channels last; the weight has them second either way."""
    x = _channels(node, b, present(node, 0), first=True)
    b.replace(_channels(node, b, qlinear_conv_of(node, b, x), first=False))


# --- products -----------------------------------------------------------------------------------------------


def gemm(node: ir.Node, b: Builder) -> None:
    """QGemm: `alpha (a b + c)`, where c is int32 of the product's scale; without a scale of its own a float."""
    x, x_scale, x_zero, w, w_scale, w_zero = (present(node, i) for i in range(6))
    x = b.transpose(x, 1, 0) if node.attributes.get_int("transA", 0) else x
    w = b.transpose(w, 1, 0) if node.attributes.get_int("transB", 0) else w
    total = b.op("MatMulInteger", x, w, _number(b, x_zero), _number(b, w_zero))
    bias, y_scale, alpha = optional(node, 6), optional(node, 7), node.attributes.get_float("alpha", 1.0)
    if bias is not None:
        total = b.op("Add", total, bias)
    scales = b.op("Mul", _number(b, x_scale), _number(b, w_scale))
    if alpha != 1.0:
        scales = b.op("Mul", scales, b.constant(alpha, dtype_of(scales)))
    if y_scale is None:
        b.replace(scaled(b, total, scales))
    else:
        b.replace(requantised(b, total, scales, y_scale, optional(node, 8)))


def matmul_to_float(node: ir.Node, b: Builder) -> None:
    """MatMulIntegerToFloat: MatMulInteger times both scales, plus a bias."""
    x, w, x_scale, w_scale = (present(node, i) for i in range(4))
    b.replace(_as_floats(b, (x, x_scale, optional(node, 4)), (w, w_scale, optional(node, 5)), optional(node, 6)))


def dynamic_matmul(node: ir.Node, b: Builder) -> None:
    """DynamicQuantizeMatMul: DynamicQuantizeLinear, then as above."""
    x, x_scale, x_zero = b.node("", "DynamicQuantizeLinear", [present(node, 0)], {}, 3).outputs
    w, w_scale = present(node, 1), present(node, 2)
    b.replace(_as_floats(b, (x, x_scale, x_zero), (w, w_scale, optional(node, 3)), optional(node, 4)))


_Quantised = tuple[ir.Value, ir.Value, ir.Value | None]


def _as_floats(b: Builder, x: _Quantised, w: _Quantised, bias: ir.Value | None) -> ir.Value:
    """The product of two quantised matrices (numbers, scale, zero point) in the dtype of the scales, plus a bias."""
    zeros = (None if zero is None else _number(b, zero) for zero in (x[2], w[2]))
    total = b.op("MatMulInteger", x[0], w[0], *zeros)
    rows = along(b, as_float(b, _number(b, x[1])), len(shape_of(x[0])), 2)
    y = scaled(b, total, b.op("Mul", rows, as_float(b, _number(b, w[1]))))
    kind = dtype_of(x[1])
    y = b.cast(y, kind)
    return y if bias is None else b.op("Add", y, bias)


def matmul_16(node: ir.Node, b: Builder) -> None:
    """MatMulInteger16: MatMulInteger of 16-bit integers, which ONNX's does not take."""
    x, w = present(node, 0), present(node, 1)
    shape = np.matmul(*(np.broadcast_to(np.int8(0), shape_of(value)) for value in (x, w))).shape
    kind = ir.DataType.UINT32 if dtype_of(x) == dtype_of(w) == ir.DataType.UINT16 else ir.DataType.INT32
    b.replace(_own(b, "MatMulInteger", [x, w], kind, shape))


def attention(node: ir.Node, b: Builder) -> None:
    """QAttention: Attention of the dequantised input and weight."""
    weight_scale = present(node, 4)
    columns = {} if shape_of(weight_scale) in ((), (1,)) else {"axis": 1}
    x = _dequantised(b, present(node, 0), present(node, 3), optional(node, 6))
    weight = _dequantised(b, present(node, 1), weight_scale, optional(node, 7), **columns)
    inputs = [x, weight, present(node, 2), optional(node, 5), optional(node, 8)]
    attributes = list(node.attributes.values())
    plain = ir.Node(node.domain, "Attention", inputs, attributes, num_outputs=len(node.outputs), name=node.name)
    for new, old in zip(plain.outputs, node.outputs):
        new.name = old.name
    ATTENTION_EXPANSIONS["Attention"](plain, b)
    for index in range(len(inputs)):
        plain.replace_input_with(index, None)


# --- weights in blocks --------------------------------------------------------------------------------------


def matmul_nbits(node: ir.Node, b: Builder) -> None:
    """MatMulNBits: weights of 2, 4 or 8 bits, packed as [n, blocks, bytes], in blocks along k.

    `(number - zero) * scale` of every block, then MatMul. A dim of blocks is there until the weight is whole, so that a
    rank has whole blocks. Zero points are packed likewise, or floats; without them they are in the middle.

    Raises:
        ModelError: the weight is laid out for one device.
    """
    x, packed, bits = present(node, 0), present(node, 1), node.attributes.get_int("bits", 4)
    n, k = (node.attributes.get_int(name, 0) for name in "NK")
    if node.attributes.get_int("weight_prepacked", 0):
        raise ModelError(
            f"{label(node)} has a weight that is laid out for one device", hint="export it unpacked", code="OM1303"
        )
    blocks = shape_of(packed)[1]
    block = node.attributes.get_int("block_size", 32)
    scales = b.reshape(present(node, 2), n, blocks, 1)
    zeros = _zeros(node, b, n, blocks, bits)
    numbers = b.op("Cast", unpacked(b, packed, bits), to=int(dtype_of(x)))
    order = optional(node, 4)
    if order is None:
        weight = b.reshape(b.op("Mul", b.op("Sub", numbers, zeros), scales), n, blocks * block)
        weight = weight if blocks * block == k else b.slice(weight, 1, 0, k)
    else:
        scales, zeros = (_in_order(b, value, order, n) for value in (scales, zeros))
        numbers = b.reshape(numbers, n, blocks * block)
        numbers = numbers if blocks * block == k else b.slice(numbers, 1, 0, k)
        weight = b.op("Mul", b.op("Sub", numbers, zeros), scales)
    y, bias = b.op("MatMul", x, b.transpose(weight, 1, 0)), optional(node, 5)
    b.replace(y if bias is None else b.op("Add", y, bias))


def _zeros(node: ir.Node, b: Builder, n: int, blocks: int, bits: int) -> ir.Value:
    """The zero points as floats, [n, blocks, 1], or one for all."""
    kind, zeros = dtype_of(present(node, 0)), optional(node, 3)
    if zeros is None:
        return b.constant(1 << (bits - 1), kind)
    if dtype_of(zeros) == ir.DataType.UINT8:
        zeros = unpacked(b, b.reshape(zeros, n, prod(shape_of(zeros)) // n), bits)
        zeros = zeros if shape_of(zeros)[1] == blocks else b.slice(zeros, 1, 0, blocks)
        zeros = b.op("Cast", zeros, to=int(kind))
    return b.reshape(zeros, n, blocks, 1)


def _in_order(b: Builder, values: ir.Value, order: ir.Value, n: int) -> ir.Value:
    """One of [n, blocks, 1] for every k, where `order` says which block k belongs to."""
    if not shape_of(values):
        return values
    return b.op("Gather", b.reshape(values, n, shape_of(values)[1]), order, axis=1)


def unpacked(b: Builder, packed: ir.Value, bits: int) -> ir.Value:
    """The numbers in bytes `[..., m]`, lowest bits first: `[..., m * 8 / bits]`."""
    if bits == 8:
        return packed
    *lead, last = shape_of(packed)
    return b.own("UnpackBits", [packed], (*lead, last * 8 // bits), {"bits": bits})


def gather_blocks(node: ir.Node, b: Builder) -> None:
    """GatherBlockQuantized: rows of a quantised table, and of its scales, dequantised block by block.

    Raises:
        ModelError: the blocks do not lie along the last dim, or it is what is looked up.
    """
    data, rows, scales, zeros = present(node, 0), present(node, 1), present(node, 2), optional(node, 3)
    rank = len(shape_of(data))
    axis = node.attributes.get_int("gather_axis", 0) % rank
    if node.attributes.get_int("quantize_axis", 1) % rank != rank - 1 or axis == rank - 1:
        raise ModelError(
            f"{label(node)} has blocks that are not along the last dim", hint="quantise it along that", code="OM1303"
        )
    bits, packs = node.attributes.get_int("bits", 4), dtype_of(data) == ir.DataType.UINT8
    picked = b.op("Gather", data, rows, axis=axis)
    by = b.op("Gather", scales, rows, axis=axis)
    kind, blocks = dtype_of(scales), shape_of(by)[-1]
    zero = _middle(b, kind, bits, packs) if zeros is None else b.op("Gather", zeros, rows, axis=axis)
    if packs:
        picked = unpacked(b, picked, bits)
    if zeros is not None:
        zero = unpacked(b, zero, bits) if packs else zero
        zero = zero if shape_of(zero)[-1] == blocks else b.slice(zero, len(shape_of(zero)) - 1, 0, blocks)
        zero = b.reshape(b.op("Cast", zero, to=int(kind)), *shape_of(by), 1)
    shape = shape_of(picked)
    numbers = b.reshape(b.op("Cast", picked, to=int(kind)), *shape_of(by), shape[-1] // blocks)
    values = b.op("Mul", b.op("Sub", numbers, zero), b.reshape(by, *shape_of(by), 1))
    b.replace(b.reshape(values, *shape))


def _middle(b: Builder, kind: ir.DataType, bits: int, packs: bool) -> ir.Value:
    """The zero point where none is given: bytes have it in the middle."""
    return b.constant((1 << (bits - 1)) if packs else 0, kind)


# --- QuantizeLinear, DequantizeLinear -----------------------------------------------------------------------


def quantize(node: ir.Node, b: Builder) -> None:
    """QuantizeLinear of this domain: ONNX's, of more dtypes than the model's opset has there."""
    inputs, zero = _scales(node, b), optional(node, 2)
    kind = ir.DataType.UINT8 if zero is None else dtype_of(zero)
    b.replace(_own(b, "QuantizeLinear", inputs, kind, shape_of(present(node, 0)), _axis(node)))


def dequantize(node: ir.Node, b: Builder) -> None:
    """DequantizeLinear of this domain: ONNX's, of more dtypes than the model's opset has there."""
    inputs, kind = _scales(node, b), dtype_of(present(node, 1))
    b.replace(_own(b, "DequantizeLinear", inputs, kind, shape_of(present(node, 0)), _axis(node)))


def _scales(node: ir.Node, b: Builder) -> list[ir.Value | None]:
    zero = optional(node, 2)
    return [present(node, 0), _number(b, present(node, 1)), None if zero is None else _number(b, zero)]


def _axis(node: ir.Node) -> dict[str, Any]:
    """Counted from the front, as in normal form."""
    return {"axis": node.attributes.get_int("axis", 1) % max(1, len(shape_of(present(node, 0))))}


def _own(
    b: Builder,
    op: str,
    inputs: Sequence[ir.Value | None],
    kind: ir.DataType,
    shape: Sequence[int],
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """An op of the normal form, of dtypes that ONNX's inference may refuse."""
    value = b.own(op, inputs, shape, attributes)
    set_type(value, kind, tuple(shape))
    return value


QUANTISED_EXPANSIONS: dict[str, Expansion] = {
    "QLinearAdd": _binary("Add"),
    "QLinearMul": _binary("Mul"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearLeakyRelu": _unary("LeakyRelu", "alpha"),
    "QLinearWhere": where,
    "QLinearConcat": concat,
    "QLinearSoftmax": softmax,
    "QLinearAveragePool": _pool("AveragePool"),
    "QLinearGlobalAveragePool": _pool("GlobalAveragePool"),
    "QLinearConv": conv,
    "QGemm": gemm,
    "MatMulIntegerToFloat": matmul_to_float,
    "DynamicQuantizeMatMul": dynamic_matmul,
    "MatMulInteger16": matmul_16,
    "QAttention": attention,
    "MatMulNBits": matmul_nbits,
    "GatherBlockQuantized": gather_blocks,
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
}
