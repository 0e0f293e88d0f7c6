"""Sequences of tensors, taken apart: what is known of every sequence is the list of its tensors.

Older exports write `split`, `chunk` and `unbind` with them. Where that list is not known when compiling, the sequence
is a loose value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import constant, infer, optional, present, shape_of, static_shape

TENSORS = "tensors"
"""`meta` key of a value that is a sequence: its tensors."""


class Unknown(Exception):
    """The length of a sequence, or a position in it, is not known when compiling."""


def take_apart(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace an op on sequences by ops on their tensors; says whether it did: only where all positions are known."""
    rule = _RULES.get(node.op_type) if not node.domain else None
    if rule is None:
        return False
    try:
        rule(node, Builder(graph, node))
    except Unknown:
        return False
    return True


def _become(b: Builder, tensors: list[ir.Value]) -> None:
    """The anchor's output is the sequence of `tensors`; the anchor stays, until nobody uses it."""
    if b.nodes:
        b.graph.insert_after(b.anchor, b.nodes)
    infer(b.anchor, b.graph.opset_imports)
    b.anchor.outputs[0].meta[TENSORS] = tensors


def _tensors(node: ir.Node, index: int = 0) -> list[ir.Value]:
    found: list[ir.Value] | None = present(node, index).meta.get(TENSORS)
    if found is None:
        raise Unknown
    return found


def _tensor(node: ir.Node, index: int) -> ir.Value:
    value = present(node, index)
    if static_shape(value) is None or value.dtype == ir.DataType.STRING or not isinstance(value.type, ir.TensorType):
        raise Unknown
    return value


def _position(node: ir.Node, index: int, length: int, default: int) -> int:
    """The position in a sequence that an input names."""
    value = optional(node, index)
    number = np.array(default) if value is None else constant(value)
    if number is None or not -length <= int(number.reshape(-1)[0]) <= length:
        raise Unknown
    position = int(number.reshape(-1)[0])
    return position + length if position < 0 else position


def _construct(node: ir.Node, b: Builder) -> None:
    _become(b, [_tensor(node, index) for index in range(len(node.inputs))])


def _insert(node: ir.Node, b: Builder) -> None:
    tensors = _tensors(node)
    at = _position(node, 2, len(tensors), len(tensors))
    _become(b, [*tensors[:at], _tensor(node, 1), *tensors[at:]])


def _split(node: ir.Node, b: Builder) -> None:
    x = _tensor(node, 0)
    axis = node.attributes.get_int("axis", 0) % len(shape_of(x))
    size, split = shape_of(x)[axis], optional(node, 1)
    given = None if split is None else constant(split)
    if split is not None and given is None:
        raise Unknown
    step = 1 if given is None else int(given.reshape(-1)[0])
    stops = np.cumsum(given) if given is not None and given.ndim else np.minimum(np.arange(0, size, step) + step, size)
    starts = [0, *stops[:-1]]
    pieces = [b.slice(x, axis, int(start), int(stop)) for start, stop in zip(starts, stops)]
    if split is None and node.attributes.get_int("keepdims", 1) == 0:
        shape = [d for i, d in enumerate(shape_of(x)) if i != axis]
        pieces = [b.reshape(piece, *shape) for piece in pieces]
    _become(b, pieces)


def _at(node: ir.Node, b: Builder) -> None:
    tensors = _tensors(node)
    position = _position(node, 1, len(tensors), 0)
    if position == len(tensors):
        raise Unknown
    b.replace(tensors[position])


def _length(node: ir.Node, b: Builder) -> None:
    b.replace(b.constant(np.array(len(_tensors(node)), np.int64)))


def _concat(node: ir.Node, b: Builder) -> None:
    tensors = _tensors(node)
    axis = node.attributes.get_int("axis", 0)
    if node.attributes.get_int("new_axis", 0) == 1:
        shape = list(shape_of(tensors[0]))
        shape.insert(axis % (len(shape) + 1), 1)
        tensors = [b.reshape(t, *shape) for t in tensors]
    b.replace(b.op("Concat", *tensors, axis=axis))


_RULES: dict[str, Callable[[ir.Node, Builder], None]] = {
    "SequenceConstruct": _construct,
    "SequenceEmpty": _construct,
    "SequenceInsert": _insert,
    "SplitToSequence": _split,
    "SequenceAt": _at,
    "SequenceLength": _length,
    "ConcatFromSequence": _concat,
}
