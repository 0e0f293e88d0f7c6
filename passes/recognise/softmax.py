"""Softmax from an exponential divided by its sum, with or without the maximum taken off first."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxmesh.passes.graph.match import (
    Editor,
    Finding,
    anchors,
    given,
    integer,
    ints,
    label,
    only_user,
    other,
    producer,
    shape_of,
    users,
)


def recognise_softmax(editor: Editor) -> Iterator[Finding]:
    """Replace `exp(x) / sum(exp(x))` over one axis. Anything else that sums exponentials is left alone."""
    for node in anchors(editor.graph, "ReduceSum"):
        exponential = producer(node.inputs[0], "Exp")
        axes = ints(node, "axes")
        if exponential is None or len(axes) != 1 or not integer(node, "keepdims", 1):
            continue
        quotient = _quotient(exponential.outputs[0], node.outputs[0])
        if quotient is None:
            continue
        x = unshifted(given(exponential, 0), axes)
        attrs = {"axis": axes[0]}
        editor.replace(quotient, editor.op("Softmax", [x], shape_of(x), attrs=attrs))
        yield Finding("Softmax", label(node), True, f"over axis {axes[0]}")


def _quotient(exponential: ir.Value, total: ir.Value) -> ir.Value | None:
    """`exponential / total`, or the product with the reciprocal of the total."""
    for node in users(total, "Div"):
        if node.inputs[0] is exponential and node.inputs[1] is total:
            return node.outputs[0]
    reciprocal = only_user(total, "Reciprocal")
    product = only_user(reciprocal.outputs[0], "Mul") if reciprocal is not None else None
    if reciprocal is None or product is None or other(product, reciprocal.outputs[0]) is not exponential:
        return None
    return product.outputs[0]


def unshifted(value: ir.Value, axes: tuple[int, ...]) -> ir.Value:
    """x where `value` is `x - max(x)` over the same axes: softmax does not see the shift."""
    node = producer(value, "Sub")
    highest = producer(given(node, 1), "ReduceMax") if node is not None else None
    if node is None or highest is None or highest.inputs[0] is not node.inputs[0]:
        return value
    return given(node, 0) if ints(highest, "axes") == axes and integer(highest, "keepdims", 1) else value
