"""ONNX's losses in the normal form: log-probabilities, then one loss that is reduced not at all or to a sum."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import DOMAIN, dtype_of, optional, present, set_type, shape_of
from onnxmesh.passes.normalise.ops import Rule


def softmax_cross_entropy(node: ir.Node, b: Builder) -> bool:
    """SoftmaxCrossEntropyLoss; its second output is what LogSoftmax gives."""
    scores = b.op("LogSoftmax", present(node, 0), axis=1)
    b.replace(*[_reduced(node, b, scores), scores][: len(node.outputs)])
    return True


def negative_log_likelihood(node: ir.Node, b: Builder) -> bool:
    """NegativeLogLikelihoodLoss, of log-probabilities."""
    b.replace(_reduced(node, b, present(node, 0)))
    return True


def _reduced(node: ir.Node, b: Builder, scores: ir.Value) -> ir.Value:
    """The loss; a mean is the sum over the sum of the weights that count, so that both can be summed up by shares."""
    target, reduction = present(node, 1), node.attributes.get_string("reduction", "mean")
    none = reduction == "none"
    attributes = {
        "reduction": "none" if none else "sum",
        "ignore_index": node.attributes.get_int("ignore_index", None),
    }
    inputs = [scores, target, optional(node, 2)]
    made = b.node(DOMAIN, "NegativeLogLikelihoodLoss", inputs, attributes, 1 if none else 2)
    for output in made.outputs:
        set_type(output, dtype_of(scores), shape_of(target) if none else ())
    return b.op("Div", *made.outputs) if reduction == "mean" else made.outputs[0]


LOSS_RULES: dict[str, Rule] = {
    "SoftmaxCrossEntropyLoss": softmax_cross_entropy,
    "NegativeLogLikelihoodLoss": negative_log_likelihood,
}
