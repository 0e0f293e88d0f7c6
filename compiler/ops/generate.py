"""Ops that make numbers from none, or draw them."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, OpView, numbered, register


def whole(view: OpView) -> Factors:
    """Every rank makes all of it; what needs a part takes that from its own."""
    return Factors(tuple((None,) * len(x or ()) for x in view.ins), tuple((None,) * len(out) for out in view.outs))


def multinomial(view: OpView) -> Factors:
    """Rows, and draws from a row: the numbers that they are drawn with are an input."""
    rows, draws = numbered(view.outs[0])
    return Factors(((rows, None), (rows, draws)), ((rows, draws),))


register(
    *("Range", "EyeLike", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"),
    *("RandomUniform", "RandomNormal"),
    factors=whole,
)
register("Multinomial", factors=multinomial)
