"""Pooling over the spatial dims of [n, c, spatial...], and over regions of it."""

from __future__ import annotations

from collections.abc import Iterable

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Port, Strategy, numbered, register
from onnxmesh.compiler.ops.space import stands_apart, tiled
from onnxmesh.runtime.placement import Placement, Shard


def pool(view: OpView) -> Factors:
    """Batch and channels, of all inputs and outputs."""
    x = view.ins[0]
    assert x is not None
    labels: Labels = (*numbered(x)[:2], *(None,) * (len(x) - 2))
    linear = (frozenset({0}),) if view.op == "GlobalAveragePool" else ()
    return Factors(tuple(labels for _ in view.ins), tuple(labels for _ in view.outs), linear=linear)


def windows(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """Space, where the kernel is the stride. Indices count from where the image begins, so there must be none."""
    if not isinstance(placement, Shard) or placement.dim < 2 or len(view.outs) > 1:
        return
    kernel = view.attr("kernel_shape")
    if stands_apart(view, kernel, placement.dim):
        yield from tiled(view, port, placement, kernel[placement.dim - 2], 1)


def highest(view: OpView) -> Factors:
    """GlobalMaxPool: every dim; of space the maximum is reduced."""
    labels = numbered(view.ins[0] or ())
    sums = tuple((label, "max") for label in labels[2:] if label is not None)
    return Factors((labels,), ((*labels[:2], *(None,) * (len(labels) - 2)),), sums=sums)


def regions(view: OpView) -> Factors:
    """x [n, c, h, w], rois [r, ...], perhaps images [r] -> [r, c, ...]: regions and channels. Any image may be read."""
    rois: list[Labels] = [("r", *(None,) * (len(shape or ()) - 1)) for shape in view.ins[1:]]
    return Factors(((None, "c", None, None), *rois), (("r", "c", None, None),))


register("MaxPool", "AveragePool", factors=pool, ports=windows)
register("GlobalAveragePool", "GlobalLpPool", "MaxUnpool", factors=pool)
register("GlobalMaxPool", factors=highest)
register(
    "LpPool",
    factors=pool,
    ports=windows,
    samples=(
        ("f[2,12,7,8] -> f[2,12,4,4]", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 0], "p": 3}),
        ("f[6,12,9] -> f[6,12,5]", {"kernel_shape": [3], "dilations": [2]}),
    ),
)
register("RoiAlign", "MaxRoiPool", factors=regions)
