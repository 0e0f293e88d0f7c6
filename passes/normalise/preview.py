"""ONNX's preview domains: optimisers, one node a tensor, and FlexAttention, whose modifiers are put in their place."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder, Expansion
from onnxmesh.passes.graph.fold import take_nodes
from onnxmesh.passes.graph.infer import DOMAIN, dtype_of, present, set_type, shape_of

OPTIMISERS = {"Adagrad": 1, "Adam": 2, "Momentum": 1}
"""How many tensors each keeps besides the one that it updates."""


def optimiser(node: ir.Node, b: Builder) -> None:
    """One node for each tensor. Inputs are rate, count, all tensors, all gradients, then the states, kind by kind."""
    kept = OPTIMISERS[node.op_type]
    rate, count, *tensors = (present(node, i) for i in range(len(node.inputs)))
    number = len(tensors) // (2 + kept)
    made = []
    for i in range(number):
        step = b.node(DOMAIN, node.op_type, [rate, count, *tensors[i::number]], dict(node.attributes), 1 + kept)
        for output in step.outputs:
            set_type(output, dtype_of(tensors[i]), shape_of(tensors[i]))
        made.append(step.outputs)
    b.replace(*(outputs[k] for k in range(1 + kept) for outputs in made))


def flex_attention(node: ir.Node, b: Builder) -> None:
    """Products and a softmax, with the modifiers' nodes between them; what is attention is recognised later."""
    q, k, v = (present(node, i) for i in range(3))
    dtype = dtype_of(q)
    given = node.attributes.get_int("softmax_precision", 0)
    wide = ir.DataType(given) if given else max(dtype, ir.DataType.FLOAT, key=lambda kind: kind.bitwidth)
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(shape_of(q)[3])
    k, v = (_repeated(b, x, shape_of(q)[1]) for x in (k, v))
    scores = b.op("MatMul", b.op("Mul", q, b.constant(scale, dtype)), b.transpose(k, 0, 1, 3, 2))
    scores = _modified(node, b, "score_mod", b.cast(scores, wide))
    probabilities = _modified(node, b, "prob_mod", b.op("Softmax", scores, axis=3))
    b.replace(b.op("MatMul", b.cast(probabilities, dtype), v))


def _repeated(b: Builder, x: ir.Value, heads: int) -> ir.Value:
    """`[b, g, t, d]` as `[b, heads, t, d]`: each head of x stands heads / g times."""
    batch, groups, length, width = shape_of(x)
    if groups == heads:
        return x
    apart = b.reshape(x, batch, groups, 1, length, width)
    apart = b.own("Expand", [apart], (batch, groups, heads // groups, length, width))
    return b.reshape(apart, batch, heads, length, width)


def _modified(node: ir.Node, b: Builder, name: str, x: ir.Value) -> ir.Value:
    """What the subgraph `name` makes of x, which keeps its type; x itself where there is none."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return x
    body = attribute.as_graph()
    nodes, (output,) = take_nodes(body, b.graph)
    if output is body.inputs[0]:
        return x
    body.inputs[0].replace_all_uses_with(x)
    b.nodes += nodes
    set_type(output, dtype_of(x), shape_of(x))
    return output


EXPANSIONS: dict[tuple[str, str], Expansion] = {
    **{("ai.onnx.preview.training", op): optimiser for op in OPTIMISERS},
    ("ai.onnx.preview", "FlexAttention"): flex_attention,
}
