"""Ops that make numbers from numbers known when compiling: sequences, windows; and the transforms of signals."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, optional, present, shape_of
from onnxmesh.passes.normalise.ops import Rule, axes_of, numbers


def range_(node: ir.Node, b: Builder) -> bool:
    """Where it ends is in the output's shape."""
    b.replace(b.own("Range", [present(node, 0), present(node, 2)], shape_of(node.outputs[0])))
    return True


def eye_like(node: ir.Node, b: Builder) -> bool:
    """Of its input only the shape counts."""
    output = node.outputs[0]
    attributes = {"k": node.attributes.get_int("k", 0)}
    b.replace(b.own("EyeLike", [], shape_of(output), attributes, dtype_of(output)))
    return True


def window(node: ir.Node, b: Builder) -> bool:
    """The size is in the output's shape."""
    output = node.outputs[0]
    attributes = {"periodic": node.attributes.get_int("periodic", 1)}
    b.replace(b.own(node.op_type, [], shape_of(output), attributes, dtype_of(output)))
    return True


def dft(node: ir.Node, b: Builder) -> bool:
    """Axis and length as attributes. Before opset 20 the axis was one."""
    x, output = present(node, 0), node.outputs[0]
    shape = shape_of(x)
    old = "axis" in node.attributes or b.graph.opset_imports.get("", 20) < 20
    given = [node.attributes.get_int("axis", 1)] if old else numbers(node, 2) or [-2]
    (axis,) = axes_of(node, given, len(shape))
    flags = {name: node.attributes.get_int(name, 0) for name in ("inverse", "onesided")}
    size = 2 * (shape[axis] - 1) if all(flags.values()) else shape[axis]
    length = (numbers(node, 1) or [size])[0]
    b.replace(b.own("DFT", [x], shape_of(output), {"axis": axis, "length": length, **flags}))
    return True


def stft(node: ir.Node, b: Builder) -> bool:
    """Step and length of the frames as attributes."""
    x, window = present(node, 0), optional(node, 2)
    step = (numbers(node, 1) or [1])[0]
    size = shape_of(window)[0] if window is not None else shape_of(x)[1]
    length = (numbers(node, 3) or [size])[0]
    onesided = node.attributes.get_int("onesided", 1)
    attributes = {"frame_step": step, "frame_length": length, "onesided": onesided}
    frames, bins = (shape_of(x)[1] - length) // step + 1, length // 2 + 1 if onesided else length
    b.replace(b.own("STFT", [x, window], (shape_of(x)[0], frames, bins, 2), attributes))
    return True


GENERATE_RULES: dict[str, Rule] = {
    "Range": range_,
    "EyeLike": eye_like,
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow"), window),
    "DFT": dft,
    "STFT": stft,
}
