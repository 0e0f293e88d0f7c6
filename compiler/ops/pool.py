"""Pooling over the spatial dims of [n, c, spatial...], and over regions of it."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, numbered, register


def pool(view: OpView) -> Factors:
    """Batch and channels, of all inputs and outputs."""
    x = view.ins[0]
    assert x is not None
    labels: Labels = (*numbered(x)[:2], *(None,) * (len(x) - 2))
    linear = (frozenset({0}),) if view.op == "GlobalAveragePool" else ()
    return Factors(tuple(labels for _ in view.ins), tuple(labels for _ in view.outs), linear=linear)


def regions(view: OpView) -> Factors:
    """x [n, c, h, w], rois [r, ...], perhaps images [r] -> [r, c, ...]: regions and channels. Any image may be read."""
    rois: list[Labels] = [("r", *(None,) * (len(shape or ()) - 1)) for shape in view.ins[1:]]
    return Factors(((None, "c", None, None), *rois), (("r", "c", None, None),))


register("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool", "MaxUnpool", factors=pool)
register(
    "LpPool",
    factors=pool,
    samples=(
        ("f[2,12,7,8] -> f[2,12,4,4]", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 0], "p": 3}),
        ("f[6,12,9] -> f[6,12,5]", {"kernel_shape": [3], "dilations": [2]}),
    ),
)
register("RoiAlign", "MaxRoiPool", factors=regions)
