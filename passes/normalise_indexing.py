"""Rules that turn general indexing into the plain ops it stands for: rows of a table, a range that is overwritten."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.build import Builder
from onnxmesh.passes.infer import constant, present, shape_of


def gather_nd(node: ir.Node, b: Builder) -> bool:
    """An index of one number picks rows: a Gather."""
    x, index = present(node, 0), present(node, 1)
    *rows, depth = shape_of(index)
    if depth != 1 or node.attributes.get_int("batch_dims", 0) != 0:
        return False
    b.replace(b.op("Gather", x, b.reshape(index, *rows), axis=0))
    return True


def scatter_nd(node: ir.Node, b: Builder) -> bool:
    """Overwriting a known range of one dim, with the other dims whole: a Concat of what stays and what is new."""
    x, updates = present(node, 0), present(node, 2)
    index = constant(present(node, 1))
    if index is None or node.attributes.get_string("reduction", "none") != "none":
        return False
    box = _box(index, shape_of(x))
    if box is None or shape_of(updates) != (*(n for _, n in box), *shape_of(x)[len(box) :]):
        return False
    cut = [axis for axis, (_, count) in enumerate(box) if count != shape_of(x)[axis]]
    if len(cut) > 1:
        return False
    axis = cut[0] if cut else 0
    first, count = box[axis]
    size = shape_of(x)[axis]
    before = [b.slice(x, axis, 0, first)] if first else []
    after = [b.slice(x, axis, first + count, size)] if first + count < size else []
    pieces = [*before, updates, *after]
    b.replace(b.op("Concat", *pieces, axis=axis) if len(pieces) > 1 else b.reshape(updates, *shape_of(x)))
    return True


def _box(index: np.ndarray, shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """(first, count) of each leading dim, if the index lists all elements of a box in order."""
    *counts, depth = index.shape
    if depth != len(counts) or depth == 0 or index.size == 0:
        return None
    index = np.where(index < 0, index + np.array(shape[:depth]), index)
    first = index.reshape(-1, depth)[0]
    wanted = np.stack(np.meshgrid(*(np.arange(n) for n in counts), indexing="ij"), axis=-1) + first
    return list(zip(first.tolist(), counts)) if np.array_equal(index, wanted) else None


INDEXING_RULES: dict[str, Callable[[ir.Node, Builder], bool]] = {"GatherND": gather_nd, "ScatterND": scatter_nd}
