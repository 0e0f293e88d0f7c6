"""Activations from their sigmoid-like core: `x * f(p(x))`, where p is a polynomial in x.

    Gelu          x / 2 * (1 + erf(x / sqrt(2)))                                     arXiv:1606.08415
    Gelu (tanh)   x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
                  = x * sigmoid(2 sqrt(2 / pi) * (x + 0.044715 x^3))
    Swish         x * sigmoid(alpha x)                                               arXiv:1710.05941

However the product and the polynomial are written, they are compared by their coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from onnxmesh.compiler.reason import Reason
from onnxmesh.passes.graph.match import (
    Editor,
    Finding,
    anchors,
    close,
    given,
    is_constant,
    label,
    only_user,
    other,
    producer,
    scalar,
    scaled,
    shape_of,
    users,
)

DEPTH = 10
Polynomial = dict[int, float]
"""Coefficients by power."""

TANH = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}
ERF = {1: math.sqrt(0.5)}


def recognise_activations(editor: Editor) -> Iterator[Finding]:
    """Replace every activation; record gated ones and linears with a bias."""
    for node in anchors(editor.graph, "Erf", "Tanh"):
        finding = _gelu(editor, node)
        if finding is not None:
            yield finding
    for node in anchors(editor.graph, "Sigmoid"):
        finding = _swish(editor, node)
        if finding is not None:
            yield finding
    yield from _gated(editor)
    yield from _linears(editor)


# --- one anchor ---------------------------------------------------------------------------------------------


def _gelu(editor: Editor, node: ir.Node) -> Finding | None:
    """Gelu around an Erf or a Tanh: None where no `x * (1 + f)` follows."""
    add = only_user(node.outputs[0], "Add")
    if add is None or scalar(other(add, node.outputs[0])) != 1:
        return None
    tanh = node.op_type == "Tanh"
    found = None
    for x, factor, out in _products(add.outputs[0]):
        inner = polynomial(given(node, 0), x, DEPTH)
        if inner is None:
            continue
        wrong = _difference(inner, TANH if tanh else ERF, x.dtype)
        if wrong is None and close(factor, 0.5, x.dtype):
            attrs = {"approximate": "tanh" if tanh else "none"}
            editor.replace(out, editor.op("Gelu", [x], shape_of(x), attrs=attrs))
            return Finding("Gelu", label(node), True, attrs["approximate"])
        found = wrong or f"the factor is {factor:g}, expected 0.5"
    return Finding("Gelu", label(node), False, Reason(found, "OM3401")) if found is not None else None


def _swish(editor: Editor, node: ir.Node) -> Finding | None:
    """Swish around a Sigmoid, or the Gelu that is written with one; None for a gate by another value."""
    for x, factor, out in _products(node.outputs[0]):
        inner = polynomial(given(node, 0), x, DEPTH)
        if inner is None or factor != 1:
            continue
        if set(inner) == {1}:
            attrs = {"alpha": inner[1]}
            editor.replace(out, editor.op("Swish", [x], shape_of(x), attrs=attrs))
            return Finding("Swish", label(node), True, f"alpha {inner[1]:g}")
        wrong = _difference(inner, {p: 2 * c for p, c in TANH.items()}, x.dtype)
        if wrong is None:
            editor.replace(out, editor.op("Gelu", [x], shape_of(x), attrs={"approximate": "tanh"}))
            return Finding("Gelu", label(node), True, "tanh, written with a sigmoid")
        return Finding("Swish", label(node), False, Reason(wrong, "OM3402"))
    return None


def _products(core: ir.Value) -> Iterator[tuple[ir.Value, float, ir.Value]]:
    """(x, factor, product) for the values x that multiply `core`, after each further constant factor."""
    value, factor = core, 1.0
    while True:
        node = only_user(value, "Mul", "Div")
        if node is None:
            return
        found = scaled(node)
        if found is not None and found[0] is value:
            value, factor = node.outputs[0], factor * found[1]
            continue
        if node.op_type == "Div" or other(node, value) is value:
            return
        yield from _through(other(node, value), factor, node.outputs[0])
        return


def _through(x: ir.Value, factor: float, product: ir.Value) -> Iterator[tuple[ir.Value, float, ir.Value]]:
    """The product with x, or with what x is a multiple of; then with the constant that may follow."""
    candidates = [(x, factor)]
    node = x.producer()
    multiple = scaled(node) if node is not None else None
    if multiple is not None:
        candidates.insert(0, (multiple[0], factor * multiple[1]))
    following = only_user(product, "Mul", "Div")
    after = scaled(following) if following is not None else None
    for base, number in candidates:
        if after is not None and following is not None and number * after[1] == 0.5:
            yield base, 0.5, following.outputs[0]
        yield base, number, product


def _difference(found: Mapping[int, float], expected: Mapping[int, float], dtype: ir.DataType | None) -> str | None:
    """In words, what tells a polynomial from the expected one."""
    if set(found) != set(expected):
        return f"its argument has the powers {sorted(found)} of x, expected {sorted(expected)}"
    for power, number in expected.items():
        if not close(found[power], number, dtype):
            return f"its constant for x^{power} is {found[power]:g}, expected {number:g}"
    return None


# --- polynomials --------------------------------------------------------------------------------------------


def polynomial(value: ir.Value, x: ir.Value, depth: int) -> Polynomial | None:
    """`value` as a polynomial in x; None where it depends on something else."""
    if value is x:
        return {1: 1.0}
    number = scalar(value)
    if number is not None:
        return {0: number}
    node = producer(value, "Mul", "Div", "Add", "Sub", "Pow", "Neg")
    if node is None or depth == 0 or shape_of(value) != shape_of(x):
        return None
    parts = [polynomial(v, x, depth - 1) for v in node.inputs if v is not None]
    if any(part is None for part in parts):
        return None
    return _combined(node.op_type, [part for part in parts if part is not None])


def _combined(op: str, parts: list[Polynomial]) -> Polynomial | None:
    first, second = parts[0], parts[1] if len(parts) > 1 else {0: -1.0}
    match op:
        case "Mul" | "Neg":
            return _times(first, second)
        case "Add":
            return _plus(first, second, 1.0)
        case "Sub":
            return _plus(first, second, -1.0)
        case "Div":
            return _times(first, {0: 1 / second[0]}) if set(second) == {0} and second[0] else None
        case "Pow":
            power = second.get(0, 0.0)
            if set(second) != {0} or power not in (1, 2, 3):
                return None
            result = first
            for _ in range(int(power) - 1):
                result = _times(result, first)
            return result
    return None


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for p, c in a.items():
        for q, d in b.items():
            result[p + q] = result.get(p + q, 0.0) + c * d
    return {power: number for power, number in result.items() if number}


def _plus(a: Polynomial, b: Polynomial, sign: float) -> Polynomial:
    result = {p: a.get(p, 0.0) + sign * b.get(p, 0.0) for p in a | b}
    return {power: number for power, number in result.items() if number}


# --- what is only recorded ----------------------------------------------------------------------------------


def _gated(editor: Editor) -> Iterator[Finding]:
    """Products of an activation and another value: SwiGLU, GeGLU (arXiv:2002.05202). They stay two ops."""
    for node in anchors(editor.graph, "Swish", "Gelu"):
        product = only_user(node.outputs[0], "Mul")
        if product is not None and not is_constant(other(product, node.outputs[0])):
            name = "SwiGLU" if node.op_type == "Swish" else "GeGLU"
            yield Finding(name, label(product), True, f"{node.op_type} times a second value, kept as two ops")


def _linears(editor: Editor) -> Iterator[Finding]:
    """MatMuls by a weight, followed by the Add of a bias. They stay two ops."""
    for node in anchors(editor.graph, "MatMul"):
        if not is_constant(node.inputs[1]):
            continue
        for add in users(node.outputs[0], "Add"):
            bias = other(add, node.outputs[0])
            if is_constant(bias) and shape_of(bias)[-1:] == shape_of(node.outputs[0])[-1:]:
                yield Finding("Linear", label(node), True, f"with the bias {bias.name}")
