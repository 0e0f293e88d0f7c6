"""Mixture of experts: every expert's layers, weighed by the gates.

| factor | cut | gives |
|---|---|---|
| t | tokens | |
| e | experts: a rank has some of them, whole | Partial: the sum over experts |
| i | the inner width of every expert | Partial: the sum of its second layer |
| o | columns of the second layer | |
"""

from __future__ import annotations

from math import prod

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, register


def experts(view: OpView) -> Factors:
    """x[t,d], gates[t,e], w1[e,i,d], w2[e,o,i], w3[e,i,d]?, b1[e,i]?, b3[e,i]? -> y[t,o]."""
    first: Labels = ("e", "i", None)
    labels: tuple[Labels, ...] = (("t", None), ("t", "e"), first, ("e", "o", "i"), first, ("e", "i"), ("e", "i"))
    ins = tuple(each if shape is not None else () for each, shape in zip(labels, view.ins))
    sums = (("e", "sum"), ("i", "sum"))
    return Factors(ins, (("t", "o"),), sums=sums, linear=(frozenset({1}), frozenset({3})))


def experts_flops(view: OpView) -> float:
    """2 t (2 or 3) i d for every expert that a token has, which are `density` of them."""
    layers = sum(prod(shape) for i, shape in enumerate(view.ins) if shape and i in (2, 3, 4))
    tokens = view.ins[0][0] if view.ins[0] else 0
    return 2.0 * tokens * layers * float(view.attr("density", 1.0))


register(
    "Experts",
    factors=experts,
    flops=experts_flops,
    samples=(
        ("f[6,4], z[6,12], f[12,24,4]!, f[12,6,24]! -> f[6,6]", {"activation": "relu"}),
        (
            "f[13,6], z[13,12], f[12,4,6]!, f[12,6,4]!, f[12,4,6]!, f[12,4]!, f[12,4]! -> f[13,6]",
            {"activation": "swish", "alpha": 1.702, "limit": 0.5, "shift": 1.0},
        ),
        ("f[12,4], f[12,4], f[4,6,4], f[4,12,6], -, f[4,6] -> f[12,12]", {"activation": "gelu"}),
    ),
)
