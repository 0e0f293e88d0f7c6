"""Ensembles of decision trees: samples are independent."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, OpView, register


def samples(view: OpView) -> Factors:
    """x [n, f] and the trees -> [n, targets]."""
    n = "n" if view.outs[0][0] > 1 else None
    trees = tuple((None,) * len(shape or ()) for shape in view.ins[1:])
    return Factors(((n, None), *trees), ((n, None),))


_TREES = "i<5[3]!, i<4[5]!, f[5]!, b[5,3]!, b[5]!, i<5[5]!, i<5[5]!, f[5,2]!"

register(
    "TreeEnsemble",
    factors=samples,
    samples=(
        (f"f[12,4], {_TREES} -> f[12,2]", {"depth": 3, "aggregate": "sum"}),
        (f"f[13,4], {_TREES}, f[5,2]! -> f[13,2]", {"depth": 2, "aggregate": "max"}),
    ),
)
