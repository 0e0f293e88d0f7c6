"""Ops over the spatial dims of [n, c, spatial...]: pooling, Resize, blocks of pixels."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, numbered, register


def pool(view: OpView) -> Factors:
    """Batch and channels."""
    x = view.ins[0]
    assert x is not None
    labels: Labels = (*numbered(x)[:2], *(None,) * (len(x) - 2))
    linear = (frozenset({0}),) if view.op == "GlobalAveragePool" else ()
    return Factors((labels,), tuple(labels for _ in view.outs), linear=linear)


def blocks(view: OpView) -> Factors:
    """DepthToSpace, SpaceToDepth: the batch."""
    x = view.ins[0]
    assert x is not None
    labels: Labels = (*numbered(x)[:1], *(None,) * (len(x) - 1))
    return Factors((labels,), (labels,), linear=(frozenset({0}),))


def resize(view: OpView) -> Factors:
    """Dims that keep their size; sizes, scales and regions of interest are whole."""
    x = view.ins[0]
    assert x is not None
    labels: Labels = tuple(
        label if size == out and i < 2 else None
        for i, (label, size, out) in enumerate(zip(numbered(x), x, view.outs[0]))
    )
    rest: tuple[Labels, ...] = tuple((None,) * len(other or ()) for other in view.ins[1:])
    return Factors((labels, *rest), (labels,))


register("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", factors=pool)
register("DepthToSpace", "SpaceToDepth", factors=blocks)
register("Resize", factors=resize)
