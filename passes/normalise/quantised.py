"""The quantised ops of ONNX: each is a product of integers, then scales, then QuantizeLinear.

So sums of integers can be shared by ranks, and what comes after is elementwise. They are expanded while shapes are
being bound, so that what scales come to is folded.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder, Expansion
from onnxmesh.passes.graph.infer import dtype_of, optional, present, set_type, shape_of

FLOAT = ir.DataType.FLOAT
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def quantised_axis(node: ir.Node, _: Builder) -> bool:
    """QuantizeLinear, DequantizeLinear: the axis is counted from the front; what the output's type says is left out.

    `precision` is a dtype's name, as in plans.
    """
    rank = max(1, len(shape_of(present(node, 0))))
    precision = ir.DataType(node.attributes.get_int("precision", 0))
    axis = node.attributes.get_int("axis", 1)
    node.attributes["axis"] = ir.AttrInt64("axis", axis % rank)
    node.attributes.pop("output_dtype", None)
    node.attributes.pop("precision", None)
    if precision != ir.DataType.UNDEFINED:
        node.attributes["precision"] = ir.AttrString("precision", precision.numpy().name)
    return False


def qlinear_matmul(node: ir.Node, b: Builder) -> None:
    """MatMulInteger, times what the three scales come to, to integers again."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (present(node, i) for i in range(8))
    total = b.op("MatMulInteger", x, w, x_zero, w_zero)
    rank = len(shape_of(x))
    scales = b.op("Mul", along(b, as_float(b, x_scale), rank, 2), as_float(b, w_scale))
    b.replace(requantised(b, total, scales, y_scale, y_zero))


def along(b: Builder, values: ir.Value, rank: int, from_end: int) -> ir.Value:
    """A vector as a dim of its own, `from_end` from the end; one number and more dims as they are."""
    shape = shape_of(values)
    if len(shape) != 1 or shape == (1,) or rank < from_end:
        return values
    return b.reshape(values, shape[0], *[1] * (from_end - 1))


def as_float(b: Builder, x: ir.Value) -> ir.Value:
    """`x` as float32."""
    return b.cast(x, FLOAT)


def scaled(b: Builder, total: ir.Value, scales: ir.Value) -> ir.Value:
    """Sums of integers as float32, times `scales`."""
    return b.op("Mul", as_float(b, total), scales)


def requantised(b: Builder, total: ir.Value, scales: ir.Value, y_scale: ir.Value, y_zero: ir.Value | None) -> ir.Value:
    """`total * (scales / y_scale)`, rounded, plus y_zero: the scales are one factor, as in ONNX Runtime."""
    y = scaled(b, total, b.op("Div", scales, as_float(b, y_scale)))
    zero = None if y_zero is None else b.reshape(y_zero)
    return b.op("QuantizeLinear", y, b.constant(1.0, FLOAT), zero)


def qlinear_conv(node: ir.Node, b: Builder) -> None:
    """ConvInteger, plus the bias, times what the three scales come to, to integers again."""
    b.replace(qlinear_conv_of(node, b, present(node, 0)))


def qlinear_conv_of(node: ir.Node, b: Builder, x: ir.Value) -> ir.Value:
    """As the node says, of `x` in the place of its input."""
    x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (present(node, i) for i in range(1, 8))
    bias, rank = optional(node, 8), len(shape_of(x))
    attributes = {name: a.value for name, a in node.attributes.items() if name in _CONV}
    total = b.op("ConvInteger", x, w, x_zero, w_zero, **attributes)
    if bias is not None:
        total = b.op("Add", total, along(b, bias, rank, rank - 1))
    scales = b.op("Mul", as_float(b, x_scale), along(b, as_float(b, w_scale), rank, rank - 1))
    return requantised(b, total, scales, y_scale, y_zero)


def dynamic_quantize_linear(node: ir.Node, b: Builder) -> None:
    """The scale that spreads x, with 0, over 0 to 255; what is 0 throughout has the scale 1, as in ONNX Runtime."""
    x = present(node, 0)
    zero = b.constant(0.0, FLOAT)
    low = b.op("Min", _reduced(b, "ReduceMin", x), zero)
    high = b.op("Max", _reduced(b, "ReduceMax", x), zero)
    spread = b.op("Div", b.op("Sub", high, low), b.constant(255.0, FLOAT))
    scale = b.op("Where", b.op("Equal", low, high), b.constant(1.0, FLOAT), spread)
    exact = b.op("Round", b.op("Clip", b.op("Div", b.op("Neg", low), scale), zero, b.constant(255.0, FLOAT)))
    point = b.op("Cast", exact, to=int(ir.DataType.UINT8))
    b.replace(*[b.op("QuantizeLinear", x, scale, point), scale, point][: len(node.outputs)])


def _reduced(b: Builder, op: str, x: ir.Value) -> ir.Value:
    rank = len(shape_of(x))
    if not rank:
        return x
    value = b.own(op, [x], (), {"axes": list(range(rank)), "keepdims": 0})
    set_type(value, dtype_of(x), ())
    return value


EXPANSIONS: dict[tuple[str, str], Expansion] = {
    ("", "QLinearMatMul"): qlinear_matmul,
    ("", "QLinearConv"): qlinear_conv,
    ("", "DynamicQuantizeLinear"): dynamic_quantize_linear,
}
QUANTISED_RULES = dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), quantised_axis)
