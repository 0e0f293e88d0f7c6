"""Random ops: their draws become RandomUniform and RandomNormal without inputs, of which every rank makes the same."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, present, shape_of
from onnxmesh.passes.normalise.ops import Rule, known

DEFAULT_RATIO = 0.5
"""Of a Dropout in training mode."""


def fill(node: ir.Node, b: Builder) -> bool:
    """RandomNormal, RandomUniform, and those with the shape of another tensor."""
    kind = node.op_type.removesuffix("Like")
    names = ("mean", "scale") if kind == "RandomNormal" else ("low", "high")
    given = {name: node.attributes.get_float(name) for name in names if name in node.attributes}
    output = node.outputs[0]
    b.replace(_draw(node, b, kind, dtype_of(output), *shape_of(output), **given))
    return True


def bernoulli(node: ir.Node, b: Builder) -> bool:
    """1 where a number from 0 to 1 is below the probability."""
    x, output = present(node, 0), node.outputs[0]
    dtype = ir.DataType.DOUBLE if x.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    chance = b.cast(x, dtype)
    drawn = b.op("Less", _draw(node, b, "RandomUniform", dtype, *shape_of(x)), chance)
    b.replace(b.op("Cast", drawn, to=int(dtype_of(output))))
    return True


def multinomial(node: ir.Node, b: Builder) -> bool:
    """The numbers that pick the classes are an input."""
    x, output = present(node, 0), node.outputs[0]
    shape = (shape_of(x)[0], node.attributes.get_int("sample_size", 1))
    uniform = _draw(node, b, "RandomUniform", ir.DataType.DOUBLE, *shape)
    b.replace(b.own("Multinomial", [x, uniform], shape, dtype=dtype_of(output)))
    return True


def dropout(node: ir.Node, b: Builder) -> bool:
    """Inference drops nothing; training drops a share, `ratio`, and scales up what stays."""
    x = present(node, 0)
    ratio = _number(node, 1, DEFAULT_RATIO) if _number(node, 2, 0.0) else 0.0
    shape, has_mask = shape_of(x), len(node.outputs) > 1
    if ratio == 0.0:
        y = b.reshape(x, *shape)
        keep = b.own("Expand", [b.constant(np.array(True))], shape) if has_mask else None
    else:
        drawn = _draw(node, b, "RandomUniform", ir.DataType.DOUBLE, *shape)
        keep = b.op("GreaterOrEqual", drawn, b.constant(ratio, ir.DataType.DOUBLE))
        scaled = b.op("Mul", x, b.constant(1 / (1 - ratio), dtype_of(x)))
        y = b.op("Where", keep, scaled, b.constant(0.0, dtype_of(x)))
    b.replace(y, *([keep] if has_mask else []))
    return True


def _number(node: ir.Node, index: int, default: float) -> float:
    array = known(node, index)
    return default if array is None or not array.size else float(array[0])


def _draw(node: ir.Node, b: Builder, op: str, dtype: ir.DataType, *shape: int, **attributes: Any) -> ir.Value:
    """Random numbers of the node's seed; one without has its own, from the name of what it makes."""
    seed = node.attributes.get("seed")
    number = int(seed.value) if seed is not None else crc32((node.outputs[0].name or "").encode())
    return b.own(op, [], shape, {"seed": number, **attributes}, dtype)


RANDOM_RULES: dict[str, Rule] = {
    **dict.fromkeys(("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"), fill),
    "Bernoulli": bernoulli,
    "Multinomial": multinomial,
    "Dropout": dropout,
}
