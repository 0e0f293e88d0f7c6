"""Linear algebra: matrices are whole, what stands before them is free."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, OpView, numbered, register


def matrices(view: OpView) -> Factors:
    """All dims but the last two."""
    labels = (*numbered(view.outs[0])[:-2], None, None)
    return Factors((labels,), (labels,))


register("Inverse", factors=matrices, samples=(("f[6,12,3,3] -> f[6,12,3,3]", {}), ("h[12,2,2] -> h[12,2,2]", {})))
