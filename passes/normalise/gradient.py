"""ai.onnx.preview.training::Gradient: the derivatives of a tensor of the graph, by reverse accumulation.

Griewank and Walther, Evaluating Derivatives (2008), chapter 3: from the result backwards, every node hands to its
inputs its output's derivative times its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, present, shape_of

Derivative = Callable[[ir.Node, Builder, ir.Value], Sequence[ir.Value]]
"""What a node hands to each of its inputs, given what its output was handed: of the output's shape, or the input's."""


def gradient(node: ir.Node, b: Builder) -> None:
    """Replace Gradient by the nodes that compute what it asks for.

    Raises:
        ModelError: its inputs are not the tensors that it names, or an op between has no derivative here.
    """
    names, y = list(node.attributes.get_strings("xs") or ()), node.attributes.get_string("y", "")
    xs = [value for value in node.inputs if value is not None]
    if [value.name for value in xs[: len(names)]] != names or node.attributes.get_strings("zs"):
        raise ModelError(
            f"{label(node)} derives by {', '.join(names)} at other tensors",
            hint="give it the tensors themselves that 'xs' names, and leave 'zs' out",
            code="OM1310",
        )
    above = list(_above(b.graph, node, xs))
    found: dict[ir.Value, ir.Value] = {}
    for value in (v for other in above for v in other.outputs if v.name == y):
        found[value] = b.own("Expand", [b.constant(1, dtype_of(value))], shape_of(value))
    for other in reversed(above):
        given = found.get(other.outputs[0])
        if given is not None:
            _hand_on(other, b, given, found)
    b.replace(*(b.op("Identity", found[x] if x in found else _zeros(b, x)) for x in xs))


def _above(graph: ir.Graph, anchor: ir.Node, xs: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes before `anchor` that depend on `xs`, in order."""
    reached, nodes = set(xs), []
    for node in graph:
        if node is anchor:
            break
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
            nodes.append(node)
    return nodes


def _hand_on(node: ir.Node, b: Builder, given: ir.Value, found: dict[ir.Value, ir.Value]) -> None:
    derivative = _DERIVATIVES.get(node.op_type) if not node.domain else None
    if derivative is None:
        raise ModelError(f"{label(b.anchor)} needs the derivative of {label(node)}, which is not known", code="OM1310")
    for x, part in zip(node.inputs, derivative(node, b, given)):
        if x is not None:
            part = _like(b, part, shape_of(x))
            found[x] = b.op("Add", found[x], part) if x in found else part


def _like(b: Builder, part: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """`part` summed over the dims along which an operand of `shape` was repeated."""
    own = shape_of(part)
    extra = len(own) - len(shape)
    axes = [i for i, size in enumerate(own) if i < extra or (shape[i - extra] == 1 and size != 1)]
    if not axes:
        return part
    return b.reshape(b.op("ReduceSum", part, b.constant(np.array(axes, np.int64)), keepdims=0), *shape)


def _zeros(b: Builder, x: ir.Value) -> ir.Value:
    return b.own("Expand", [b.constant(0, dtype_of(x))], shape_of(x))


# --- derivatives --------------------------------------------------------------------------------------------


def _one(b: Builder, x: ir.Value) -> ir.Value:
    return b.constant(1, dtype_of(x))


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    return present(node, 0), present(node, 1)


def _add(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    return [g] * len(node.inputs)


def _sub(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    return [g, b.op("Neg", g)]


def _mul(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    x, y = _operands(node)
    return [b.op("Mul", g, y), b.op("Mul", g, x)]


def _div(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    """d(x/y) = dx / y - (x/y) dy / y."""
    share = b.op("Div", g, present(node, 1))
    return [share, b.op("Neg", b.op("Mul", share, node.outputs[0]))]


def _matmul(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    """Of matrices, or stacks of them: dX = dY Wᵀ, dW = Xᵀ dY."""
    x, w = _operands(node)
    ranks = len(shape_of(x)), len(shape_of(w))
    if min(ranks) < 2:
        raise ModelError(
            f"{label(b.anchor)} needs the derivative of {label(node)} of a vector, which is not known", code="OM1310"
        )
    turned = [b.transpose(v, *range(r - 2), r - 1, r - 2) for v, r in zip((x, w), ranks)]
    return [b.op("MatMul", g, turned[1]), b.op("MatMul", turned[0], g)]


def _neg(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    return [b.op("Neg", g)]


def _identity(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    return [g]


def _exp(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    return [b.op("Mul", g, node.outputs[0])]


def _log(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    return [b.op("Div", g, present(node, 0))]


def _sqrt(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    """1 / (2 y)."""
    y = node.outputs[0]
    return [b.op("Div", g, b.op("Add", y, y))]


def _tanh(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    """1 - y²."""
    y = node.outputs[0]
    return [b.op("Mul", g, b.op("Sub", _one(b, y), b.op("Mul", y, y)))]


def _sigmoid(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    """y (1 - y)."""
    y = node.outputs[0]
    return [b.op("Mul", g, b.op("Mul", y, b.op("Sub", _one(b, y), y)))]


def _relu(node: ir.Node, b: Builder, g: ir.Value) -> Sequence[ir.Value]:
    """What was positive."""
    y = node.outputs[0]
    return [b.op("Mul", g, b.op("Cast", b.op("Greater", y, b.constant(0, dtype_of(y))), to=int(dtype_of(y))))]


_DERIVATIVES: dict[str, Derivative] = {
    "Add": _add,
    "Sum": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "MatMul": _matmul,
    "Neg": _neg,
    "Identity": _identity,
    "Exp": _exp,
    "Log": _log,
    "Sqrt": _sqrt,
    "Tanh": _tanh,
    "Sigmoid": _sigmoid,
    "Relu": _relu,
}
