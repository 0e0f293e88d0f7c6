"""Ops that resample or rearrange images [n, c, spatial...]: Resize, grids, blocks of pixels."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from onnxmesh.compiler.ir import segments as algebra
from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Port, Shape, Strategy, numbered, register
from onnxmesh.compiler.ops.space import tiled
from onnxmesh.runtime.placement import Placement, Segments, Shard


def resize(view: OpView) -> Factors:
    """Dims that stay as they are; the region of interest is whole."""
    x = _shape(view)
    scales = view.attr("scales") or [out / size if size else 1.0 for size, out in zip(x, view.outs[0])]
    cropped = view.attr("axes", ()) if len(view.ins) > 1 else ()
    labels: Labels = tuple(
        label if size == out and scale == 1 and axis not in cropped else None
        for axis, (label, size, out, scale) in enumerate(zip(numbered(x), x, view.outs[0], scales))
    )
    rest: tuple[Labels, ...] = tuple((None,) * len(other or ()) for other in view.ins[1:])
    return Factors((labels, *rest), (labels,))


def enlarged(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """A dim of which every entry is repeated so many times: the nearest one, by ways that round to the same."""
    if not isinstance(placement, Shard) or view.attr("mode", "nearest") != "nearest" or len(view.ins) > 1:
        return
    way = view.attr("coordinate_transformation_mode", "half_pixel")
    nearest = view.attr("nearest_mode", "round_prefer_floor")
    size, out = _shape(view)[placement.dim], view.outs[0][placement.dim]
    scales = view.attr("scales")
    repeats = out // size if size else 0
    exact = repeats > 1 and size * repeats == out and (not scales or scales[placement.dim] == repeats)
    if exact and (way, nearest) in _REPEATING:
        yield from tiled(view, port, placement, 1, repeats)


_REPEATING = (("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil"), ("asymmetric", "floor"))


def grid_sample(view: OpView) -> Factors:
    """x [n, c, ...], grid [n, points..., d] -> [n, c, points...]: batch, channels and points."""
    points: Labels = tuple(f"p{i}" for i in range(len(view.outs[0]) - 2))
    image: Labels = ("n", "c", *(None,) * (len(_shape(view)) - 2))
    return Factors((image, ("n", *points, None)), (("n", "c", *points),))


def affine_grid(view: OpView) -> Factors:
    """theta [n, d, d + 1] -> [n, points..., d]: the batch, and the coordinates."""
    return Factors((("n", "d", None),), (("n", *(None,) * (len(view.outs[0]) - 2), "d"),))


def batch(view: OpView) -> Factors:
    """DepthToSpace, SpaceToDepth, Col2Im: the batch."""
    labels: Labels = ("n", *(None,) * (len(_shape(view)) - 1))
    return Factors((labels,), (("n", *(None,) * (len(view.outs[0]) - 1)),), linear=(frozenset({0}),))


def blocks(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """DepthToSpace and SpaceToDepth: channels, and space.

    Mode DCR has every channel once a pixel of a block, CRD its pixels.
    """
    if not isinstance(placement, Shard) or placement.dim == 0:
        return
    if placement.dim > 1:
        size = view.attr("blocksize")
        yield from tiled(view, port, placement, *((size, 1) if view.op == "SpaceToDepth" else (1, size)))
        return
    pixels, deep = view.attr("blocksize") ** 2, port.is_output == (view.op == "SpaceToDepth")
    other = _blocked(placement.segments, view.ranks, pixels, deep=deep, crd=view.attr("mode", "DCR") == "CRD")
    if other is not None:
        yield _channels(placement.segments, other, port)


def _blocked(cut: Segments, ranks: int, pixels: int, *, deep: bool, crd: bool) -> Segments | None:
    """The cut of the shallow channels for one of the deep ones (`pixels` as many), or the other way round."""
    if crd:
        return algebra.scaled(cut, ranks, *((pixels, 1) if deep else (1, pixels)))
    if not deep:
        return cut * pixels
    once = cut[: len(cut) // pixels]
    return once if once and once * pixels == cut else None


def col2im(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """x [n, c * block, positions] -> [n, c, sizes...]: channels."""
    if not isinstance(placement, Shard) or placement.dim != 1:
        return
    block = prod(view.attr("block_shape"))
    other = algebra.scaled(placement.segments, view.ranks, *((1, block) if port.is_output else (block, 1)))
    if other is not None:
        yield _channels(placement.segments, other, port)


def _channels(cut: Segments, other: Segments, port: Port) -> Strategy:
    before, after = (other, cut) if port.is_output else (cut, other)
    return Strategy("c", (Shard(1, before),), (Shard(1, after),))


def _shape(view: OpView) -> Shape:
    shape = view.ins[0]
    assert shape is not None
    return shape


register("Resize", factors=resize, ports=enlarged)
register(
    "GridSample",
    factors=grid_sample,
    samples=(
        ("f[2,12,4,5], f[2,6,3,2] -> f[2,12,6,3]", {}),
        ("f[6,12,4,5], f[6,2,12,2] -> f[6,12,2,12]", {"mode": "cubic", "padding_mode": "border"}),
        ("f[2,4,4,5], f[2,6,3,2] -> f[2,4,6,3]", {"padding_mode": "reflection", "align_corners": 1}),
        ("f[2,4,4,5], f[2,6,3,2] -> f[2,4,6,3]", {"mode": "nearest", "padding_mode": "reflection"}),
        ("f[2,4,4,5], f[2,6,3,2] -> f[2,4,6,3]", {"mode": "cubic", "padding_mode": "reflection"}),
    ),
)
register("AffineGrid", factors=affine_grid)
register("DepthToSpace", "SpaceToDepth", factors=batch, ports=blocks)
register("Col2Im", factors=batch, ports=col2im)
