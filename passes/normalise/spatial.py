"""Rules for ops over the spatial dims of [n, c, spatial...]: sizes, scales and blocks become attributes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.deciding import value_hint
from onnxmesh.passes.graph.infer import DOMAIN, constant, label, optional, present, set_type, shape_of
from onnxmesh.passes.normalise.ops import Rule, axes_of, numbers

_CROP = "tf_crop_and_resize"


def resize(node: ir.Node, b: Builder) -> bool:
    """`scales` of every dim as an attribute where they are not target by source size; `roi` only where it crops."""
    x = present(node, 0)
    shape, out = shape_of(x), shape_of(node.outputs[0])
    given = node.attributes.get_ints("axes", ())
    axes = [axis % len(shape) for axis in given] or list(range(len(shape)))
    kept = ("antialias", "cubic_coeff_a", "exclude_outside", "extrapolation_value", "mode", "nearest_mode")
    attributes = {name: node.attributes[name].value for name in kept if name in node.attributes}
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    attributes["coordinate_transformation_mode"] = mode
    attributes["scales"] = _scales(node, shape, axes)
    roi = optional(node, 1) if mode == _CROP else None
    if roi is not None:
        attributes["axes"] = axes
    b.replace(b.own("Resize", [x, roi], out, attributes))
    return True


def _scales(node: ir.Node, shape: Sequence[int], axes: Sequence[int]) -> list[float] | None:
    """The factors of all dims; None where they are target by source size."""
    scales, sizes = constant(optional(node, 2)), numbers(node, 3)
    if scales is not None and scales.size:
        return [dict(zip(axes, map(float, scales))).get(axis, 1.0) for axis in range(len(shape))]
    if not sizes and optional(node, 2) is not None:
        raise ModelError(
            f"the scales of {label(node)} must be known when compiling, but depend on data",
            hint=value_hint(node.inputs[2]),
            code="OM1208",
        )
    policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch" or not sizes:
        return None
    choose = min if policy == "not_larger" else max
    factor = choose(size / shape[axis] for axis, size in zip(axes, sizes))
    return [factor if axis in axes else 1.0 for axis in range(len(shape))]


def max_pool(node: ir.Node, b: Builder) -> bool:
    """Indices count within a plane: those of the whole tensor are that plus the place of the plane."""
    if len(node.outputs) < 2:
        return False
    x, attributes = present(node, 0), {name: a.value for name, a in node.attributes.items()}
    if not (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        b.replace(b.op("MaxPool", x, **attributes), None)
        return True
    made = b.node(DOMAIN, "MaxPool", [x], attributes, 2)
    for new, dtype in zip(made.outputs, (x.dtype, ir.DataType.INT64)):
        set_type(new, dtype, shape_of(node.outputs[0]))
    indices = made.outputs[1]
    for offset in _planes(shape_of(x)[:2], prod(shape_of(x)[2:]), len(shape_of(x))):
        indices = b.op("Add", indices, b.constant(offset))
    b.replace(made.outputs[0], indices)
    return True


def max_unpool(node: ir.Node, b: Builder) -> bool:
    """Indices count within a plane, as those of MaxPool."""
    x, indices = present(node, 0), present(node, 1)
    plane = prod(_unpooled(node, shape_of(x)))
    for offset in _planes(shape_of(x)[:2], plane, len(shape_of(x))):
        indices = b.op("Sub", indices, b.constant(offset))
    attributes = {name: a.value for name, a in node.attributes.items()}
    b.replace(b.own("MaxUnpool", [x, indices], shape_of(node.outputs[0]), attributes))
    return True


def _unpooled(node: ir.Node, shape: Sequence[int]) -> list[int]:
    """The spatial sizes that a MaxPool with these attributes had."""
    taps = node.attributes.get_ints("kernel_shape")
    strides = node.attributes.get_ints("strides", ()) or (1,) * len(taps)
    pads = node.attributes.get_ints("pads", ()) or (0,) * 2 * len(taps)
    return [
        (n - 1) * s + t - pads[i] - pads[i + len(taps)] for i, (n, s, t) in enumerate(zip(shape[2:], strides, taps))
    ]


def _planes(sizes: Sequence[int], plane: int, rank: int) -> list[np.ndarray]:
    """Where the planes of [n, c, ...] begin in the flat tensor: a summand by image and one by channel."""
    rest = (1,) * (rank - 2)
    images, channels = (np.arange(size, dtype=np.int64) * plane for size in sizes)
    return [(images * sizes[1]).reshape(-1, 1, *rest), channels.reshape(-1, *rest)]


def center_crop_pad(node: ir.Node, b: Builder) -> bool:
    """A Slice and a Pad; of an odd difference the larger part is at the end."""
    x = present(node, 0)
    shape, target = list(shape_of(x)), list(shape_of(node.outputs[0]))
    cut = [axis for axis, (size, to) in enumerate(zip(shape, target)) if to < size]
    if cut:
        starts = [(shape[axis] - target[axis]) // 2 for axis in cut]
        for axis in cut:
            shape[axis] = target[axis]
        x = b.own("Slice", [x], shape, {"axes": cut, "starts": starts, "steps": [1] * len(cut)})
    before = [(to - size) // 2 for size, to in zip(shape, target)]
    after = [to - size - first for size, to, first in zip(shape, target, before)]
    b.replace(b.own("Pad", [x], target, {"pads": [*before, *after], "mode": "constant"}))
    return True


def col2im(node: ir.Node, b: Builder) -> bool:
    """The image's sizes are in the output's shape; the block's are an attribute."""
    attributes = {name: a.value for name, a in node.attributes.items()}
    attributes["block_shape"] = numbers(node, 2)
    b.replace(b.own("Col2Im", [present(node, 0)], shape_of(node.outputs[0]), attributes))
    return True


def affine_grid(node: ir.Node, b: Builder) -> bool:
    """The sizes are in the output's shape."""
    corners = node.attributes.get_int("align_corners", 0)
    shape = shape_of(node.outputs[0])
    b.replace(b.own("AffineGrid", [present(node, 0)], shape, {"align_corners": corners}))
    return True


def mean_variance(node: ir.Node, b: Builder) -> bool:
    """The axes stand in the attribute, counted from the front."""
    axes = axes_of(node, node.attributes.get_ints("axes", (0, 2, 3)), len(shape_of(present(node, 0))))
    node.attributes["axes"] = ir.AttrInt64s("axes", axes)
    return False


SPATIAL_RULES: dict[str, Rule] = {
    "Resize": resize,
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
    "CenterCropPad": center_crop_pad,
    "Col2Im": col2im,
    "AffineGrid": affine_grid,
    "MeanVarianceNormalization": mean_variance,
}
