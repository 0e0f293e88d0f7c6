"""What the ops that move data do to windows (docs/layout.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from onnxmesh.compiler.ir.view import is_constant, plain_attrs, shape_of
from onnxmesh.compiler.ir.window import Window
from onnxmesh.compiler.ops.collectives import VIEWS
from onnxmesh.runtime.placement import Replicate

BIJECTIVE = (*VIEWS, "Transpose")
"""Ops whose output holds every element of the input once."""
_MOVING = (*BIJECTIVE, "Slice", "Split", "Expand")

Path = list[tuple[ir.Value, ir.Node | None]]
"""Values, each with the moving op that makes it from the one before."""


def moves(node: ir.Node) -> bool:
    """Whether the outputs of a node may be windows of its first input."""
    return node.op_type in _MOVING or _picked(node) is not None


def _picked(node: ir.Node) -> int | None:
    """The one entry of a dim that a Gather takes, if it is known and the same on every rank."""
    index = node.inputs[1] if node.op_type == "Gather" else None
    if index is None or index.const_value is None or index.const_value.size != 1 or not is_constant(index):
        return None
    same = all(isinstance(placement, Replicate) for _, placement in index.meta.get("spec", ()))
    return int(index.const_value.numpy().item()) if same else None


def through(node: ir.Node, window: Window) -> list[Window | None]:
    """The windows of a moving op's outputs, where its input lies in `window`; None: none says that."""
    attrs, shapes = plain_attrs(node), [shape_of(value) for value in node.outputs]
    match node.op_type:
        case "Transpose":
            return [window.transposed(permutation(node))]
        case "Expand":
            return [window.expanded(shapes[0])]
        case "Slice":
            return [_sliced(window, attrs["axes"], attrs["starts"], attrs["steps"], shapes[0])]
        case "Split":
            axis = int(attrs.get("axis", 0)) % len(window.shape)
            starts = [sum(shape[axis] for shape in shapes[:i]) for i in range(len(shapes))]
            return [window.part(axis, start, shape[axis]) for start, shape in zip(starts, shapes)]
        case "Gather":
            axis, picked = int(attrs.get("axis", 0)) % len(window.shape), _picked(node)
            assert picked is not None
            return [window.part(axis, picked % window.shape[axis], 1).reshaped(shapes[0])]
        case _:
            return [window.reshaped(shapes[0])]


def _sliced(
    window: Window, axes: Iterable[int], starts: Iterable[int], steps: Iterable[int], shape: tuple[int, ...]
) -> Window | None:
    for axis, start, step in zip(axes, starts, steps):
        if step < 1:
            return None
        window = window.part(axis, start, shape[axis], step)
    return window


def inverse(node: ir.Node, window: Window) -> Window | None:
    """Where the input of a bijective op lies, if its output lies in `window`; None: no window says that."""
    value = node.inputs[0]
    assert value is not None
    if node.op_type == "Transpose":
        perm = permutation(node)
        return window.transposed([perm.index(i) for i in range(len(perm))])
    return window.reshaped(shape_of(value))


def permutation(node: ir.Node) -> list[int]:
    perm = plain_attrs(node).get("perm")
    return list(perm or reversed(range(len(shape_of(node.outputs[0])))))


def path_of(value: ir.Value) -> Path:
    """From what a value is a view of to the value, each with the moving op that makes it."""
    path: Path = []
    producer = value.producer()
    while producer is not None and moves(producer):
        path.insert(0, (value, producer))
        source = producer.inputs[0]
        assert source is not None
        value, producer = source, source.producer()
    return [(value, None), *path]


def follow(path: Path, window: Window) -> Window | None:
    """The window of a path's end, where its start lies in `window`."""
    found: Window | None = window
    for value, node in path:
        if node is not None:
            found = through(node, found)[value.index() or 0] if found else None
    return found


def side_by_side(parts: Sequence[Window], axis: int) -> Window | None:
    """The window that holds all parts one after another along `axis`; None where they do not lie so."""
    first = parts[0]
    axis %= len(first.shape)
    step = max((part.strides[axis] for part in parts if part.shape[axis] > 1), default=None)
    if step is None and len(parts) > 1:
        step = parts[1].offset - first.offset
    size = sum(part.shape[axis] for part in parts)
    whole = Window(
        tuple(size if i == axis else n for i, n in enumerate(first.shape)),
        tuple(step or 0 if i == axis else s for i, s in enumerate(first.strides)),
        first.offset,
    )
    start = 0
    for part in parts:
        if not part.lies_as(whole.part(axis, start, part.shape[axis])):
            return None
        start += part.shape[axis]
    return whole
