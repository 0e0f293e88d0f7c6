"""Caches of keys and values that keep their size: TensorScatter writes along one axis, which is whole."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, numbered, register


def tensor_scatter(view: OpView) -> Factors:
    """past, update, and where to begin [b]: all dims but the axis."""
    shape = view.outs[0]
    axis = int(view.attr("axis", -2)) % len(shape)
    labels: Labels = tuple(None if i == axis else label for i, label in enumerate(numbered(shape)))
    return Factors((labels, labels, labels[:1])[: len(view.ins)], (labels,))


register(
    "TensorScatter",
    factors=tensor_scatter,
    samples=(
        ("f[4,6,9,5], f[4,6,3,5] -> f[4,6,9,5]", {}),
        ("f[4,13,12], f[4,3,12], n[4] -> f[4,13,12]", {"axis": 1, "mode": "linear"}),
        ("f[6,12,8,4], f[6,12,8,3], i<4[6] -> f[6,12,8,4]", {"axis": 3, "mode": "circular"}),
    ),
)
