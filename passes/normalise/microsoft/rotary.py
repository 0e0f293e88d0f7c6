"""The rotary embeddings of `com.microsoft`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, present, shape_of
from onnxmesh.passes.normalise.attention import rotate, table_at


def rotary_embedding(node: ir.Node, b: Builder) -> None:
    """As ONNX's, with its inputs in another order, and positions that may be one offset.

    A packed batch (`is_packed_batching`) has a position for every token, as any other.
    """
    x, positions = present(node, 0), present(node, 1)
    batch, length = _tokens(x)
    if shape_of(positions) != (batch, length):
        steps = b.constant(np.arange(length, dtype=np.int64).reshape(1, -1))
        first = b.op("Cast", b.reshape(positions, 1, 1), to=int(ir.DataType.INT64))
        positions = b.op("Add", first, steps)
    _turn(node, b, [table_at(b, present(node, i), positions, by_head=_by_head(x)) for i in (2, 3)])


def _by_head(x: ir.Value) -> bool:
    return len(shape_of(x)) == 4


def _tokens(x: ir.Value) -> tuple[int, int]:
    """Batch and length of `[b, h, s, d]` or `[b, s, h * d]`."""
    shape = shape_of(x)
    return shape[0], shape[2] if len(shape) == 4 else shape[1]


def _turn(node: ir.Node, b: Builder, tables: list[ir.Value]) -> None:
    """The first dims of every head, rotated by the tables of its tokens."""
    x, dims = present(node, 0), node.attributes.get_int("rotary_embedding_dim", 0)
    shape, half = shape_of(x), shape_of(tables[0])[-1]
    if not _by_head(x):
        heads = node.attributes.get_int("num_heads", 0) or shape[2] // (2 * half)
        x = b.reshape(x, *shape[:2], heads, shape[2] // heads)
    y = rotate(b, x, *tables, dims=dims or 2 * half, interleaved=node.attributes.get_int("interleaved", 0))
    b.replace(y if _by_head(present(node, 0)) else b.reshape(y, *shape))


def multimodal_rotary_embedding(node: ir.Node, b: Builder) -> None:
    """MRotaryEmbedding: every part of a head turns by the position in time, in height or in width.

    The parts stand one after another (`mrope_layout` 0), or in turns, where time has what the others leave (1).

    Raises:
        ModelError: there are not three sections that make up half a head.
    """
    x, positions = present(node, 0), present(node, 1)
    sections = list(node.attributes.get_ints("mrope_section", ()))
    half = shape_of(present(node, 2))[1]
    if len(sections) != 3 or sum(sections) != half:
        raise ModelError(f"{label(node)} has the sections {sections}, not three that sum up to {half}", code="OM1311")
    which = np.repeat(np.arange(3), sections)
    if node.attributes.get_int("mrope_layout", 0):
        which = np.zeros(half, np.int64)
        for axis in (1, 2):
            which[axis : 3 * sections[axis] : 3] = axis
    tables = [_mixed(b, present(node, i), positions, which, by_head=_by_head(x)) for i in (2, 3)]
    _turn(node, b, tables)


def _mixed(b: Builder, table: ir.Value, positions: ir.Value, which: np.ndarray, *, by_head: bool) -> ir.Value:
    """The rows at the three positions, of which every column takes one."""
    _, batch, length = shape_of(positions)
    rows = [
        table_at(b, table, b.reshape(b.slice(positions, 0, i, i + 1), batch, length), by_head=by_head) for i in range(3)
    ]
    mixed = rows[0]
    for axis in (1, 2):
        mixed = b.op("Where", b.constant(which == axis), rows[axis], mixed)
    return mixed


def gemma_rotary_embedding(node: ir.Node, b: Builder) -> None:
    """GemmaRotaryEmbedding: q and k times the cosines of the angles, plus their rotations times the sines."""
    angles, dtype = present(node, 0), dtype_of(present(node, 1))
    batch, length, width = shape_of(angles)
    cos, sin = (
        b.reshape(b.op("Cast", b.op(op, angles), to=int(dtype)), batch, 1, length, width) for op in ("Cos", "Sin")
    )
    turned = [b.op("Add", b.op("Mul", present(node, i), cos), b.op("Mul", present(node, i + 1), sin)) for i in (1, 3)]
    b.replace(*turned)


ROTARY_EXPANSIONS = {
    "RotaryEmbedding": rotary_embedding,
    "MRotaryEmbedding": multimodal_rotary_embedding,
    "GemmaRotaryEmbedding": gemma_rotary_embedding,
}
