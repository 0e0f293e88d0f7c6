"""Losses of a classifier: samples and places are independent, classes are not."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, numbered, register


def negative_log_likelihood(view: OpView) -> Factors:
    """x [n, c, ...], target [n, ...], weight [c]? -> [n, ...], or two sums."""
    _, target, *weight = view.ins
    places = numbered(target or ())
    ins: tuple[Labels, ...] = ((*places[:1], None, *places[1:]), places, *((None,) * len(w or ()) for w in weight))
    if view.attr("reduction") == "none":
        return Factors(ins, (places,))
    return Factors(ins, ((), ()), sums=tuple((label, "sum") for label in places if label))


_SUM = {"reduction": "sum"}

register(
    "NegativeLogLikelihoodLoss",
    factors=negative_log_likelihood,
    samples=(
        ("f[12,5], i<5[12] -> f[12]", {"reduction": "none"}),
        ("f[4,5,6], i<5[4,6], f[5] -> f[4,6]", {"reduction": "none", "ignore_index": 2}),
        ("f[12,5], i<5[12] -> f[], f[]", _SUM),
        ("f[4,5,6,3], i<5[4,6,3], p[5]! -> f[], f[]", {**_SUM, "ignore_index": 0}),
        ("f[13,5], i<5[13], p[5] -> f[], f[]", {**_SUM, "ignore_index": -1}),
    ),
)
