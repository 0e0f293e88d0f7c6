"""Rules that turn general indexing into the plain ops it stands for: rows of a table, a range that is overwritten."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import constant, present, shape_of

INDICES = 1 << 16
"""Bytes of indices that are looked into."""


def pick(node: ir.Node, b: Builder) -> bool:
    """A Gather of one column, or of a run of columns, that a constant picks: a Slice.

    Rows stay: one token of a sequence that is shared out is taken by the rule of the Gather.
    """
    x, index = present(node, 0), constant(present(node, 1), INDICES)
    shape, axis = shape_of(x), node.attributes.get_int("axis", 0)
    if x.is_initializer() or index is None or index.size == 0 or axis != len(shape) - 1:
        return False
    picked = index.reshape(-1)
    start = int(picked[0]) % shape[axis]
    if not np.array_equal(picked % shape[axis], np.arange(start, start + picked.size)):
        return False
    run = b.slice(x, axis, start, start + picked.size)
    b.replace(b.reshape(run, *shape[:axis], *index.shape, *shape[axis + 1 :]))
    return True


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
    pieces = [*_range(b, x, axis, 0, first), updates, *_range(b, x, axis, first + count, size)]
    b.replace(_join(b, pieces, axis) if len(pieces) > 1 else b.reshape(updates, *shape_of(x)))
    return True


def _range(b: Builder, x: ir.Value, axis: int, start: int, stop: int) -> list[ir.Value]:
    """`x[start:stop]` along `axis`, in pieces: of a Concat its own parts, where none is cut."""
    if start == stop:
        return []
    producer = x.producer()
    if producer is None or producer.op_type != "Concat" or producer.attributes.get_int("axis") != axis:
        return [b.slice(x, axis, start, stop)]
    kept, at = [], 0
    for part in producer.inputs:
        assert part is not None
        end = at + shape_of(part)[axis]
        if start <= at and end <= stop:
            kept.append(part)
        elif at < stop and start < end:
            return [b.slice(x, axis, start, stop)]
        at = end
    return kept


def _join(b: Builder, pieces: list[ir.Value], axis: int) -> ir.Value:
    """The pieces one after the other; pieces that are all transposed alike are joined before that."""
    producers = [piece.producer() for piece in pieces]
    perms = {_permutation(producer) for producer in producers}
    perm = perms.pop()
    if perms or perm is None:
        return b.op("Concat", *pieces, axis=axis)
    sources = [producer.inputs[0] for producer in producers if producer is not None]
    return b.transpose(b.op("Concat", *sources, axis=perm[axis]), *perm)


def _permutation(node: ir.Node | None) -> tuple[int, ...] | None:
    """How a Transpose permutes; None where the node is none."""
    if node is None or node.op_type != "Transpose":
        return None
    return tuple(node.attributes.get_ints("perm", ())) or None


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
