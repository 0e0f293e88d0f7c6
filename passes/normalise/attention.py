"""ONNX's Attention (23 to 25) and RotaryEmbedding (23) in the normal form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import DOMAIN, dtype_of, label, optional, present, shape_of
from onnxmesh.passes.normalise.ops import Rule
from onnxmesh.passes.normalise.scores import Scoring, attend_with_scores

# --- attention ----------------------------------------------------------------------------------------------


def attention(node: ir.Node, b: Builder) -> bool:
    """Heads as a dim, the cache as a Concat, causality as positions, other masks as one mask of rank 4.

    Raises:
        ModelError: its inputs do not fit.
    """
    q, k, v = (_with_heads(node, b, i) for i in range(3))
    past = optional(node, 4)
    offset = 0 if past is None else shape_of(past)[2]
    if past is not None:
        k = b.op("Concat", past, k, axis=2)
        v = b.op("Concat", present(node, 5), v, axis=2)
    sizes = Sizes(shape_of(q)[2], shape_of(k)[2], offset)
    given = node.attributes.get_float("scale", None)
    scale = 1.0 / math.sqrt(shape_of(q)[3]) if given is None else given
    softcap = node.attributes.get_float("softcap", 0.0)
    scores = None
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        bias, visible = _masks(node, b, sizes)
        y, scores = attend_with_scores(b, (q, k, v), bias, visible, _scoring(node, scale, softcap))
    else:
        mask, positions = _visibility(node, b, sizes, dtype_of(q))
        y = attend(b, (q, k, v), mask, positions, scale=scale, softcap=softcap)
    if len(shape_of(present(node, 0))) == 3:
        y = join_heads(b, y)
    b.replace(*[y, k, v, scores][: len(node.outputs)])
    return True


def _scoring(node: ir.Node, scale: float, softcap: float) -> Scoring:
    precision = node.attributes.get_int("softmax_precision", 0)
    mode = node.attributes.get_int("qk_matmul_output_mode", 0)
    return Scoring(scale, softcap, mode, ir.DataType(precision) if precision else None)


def attend(
    b: Builder,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    mask: ir.Value | None,
    positions: tuple[ir.Value, ir.Value] | None,
    *,
    scale: float,
    softcap: float = 0.0,
    masked_row: str = "zero",
) -> ir.Value:
    """The Attention of the normal form. A row that sees nothing is zero, as ONNX says since 1.23."""
    attributes = {"scale": scale, "softcap": softcap, "masked_row": masked_row}
    inputs = [*qkv, mask, *(positions or ())]
    return b.node(DOMAIN, "Attention", inputs, attributes).outputs[0]


def split_heads(b: Builder, x: ir.Value, heads: int) -> ir.Value:
    """`[b, s, heads * d]` as `[b, heads, s, d]`."""
    batch, length, width = shape_of(x)
    return b.transpose(b.reshape(x, batch, length, heads, width // heads), 0, 2, 1, 3)


def join_heads(b: Builder, x: ir.Value) -> ir.Value:
    """`[b, heads, s, d]` as `[b, s, heads * d]`."""
    batch, heads, length, width = shape_of(x)
    return b.reshape(b.transpose(x, 0, 2, 1, 3), batch, length, heads * width)


def _with_heads(node: ir.Node, b: Builder, index: int) -> ir.Value:
    x = present(node, index)
    if len(shape_of(x)) == 4:
        return x
    name = "kv_num_heads" if index else "q_num_heads"
    heads = node.attributes.get_int(name, 0)
    if heads <= 0 or shape_of(x)[2] % heads:
        raise ModelError(
            f"{label(node)} has {name} = {heads}, which does not divide the width of '{x.name}' {list(shape_of(x))}",
            code="OM1304",
        )
    return split_heads(b, x, heads)


# --- who sees whom ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    """What hides keys besides the mask: the number of valid ones [b], causality, windows (-1: none)."""

    valid: ir.Value | None
    causal: bool
    windows: tuple[int, int]

    @classmethod
    def of(cls, node: ir.Node) -> _Limits:
        """Those of an ONNX Attention."""
        left, right = (node.attributes.get_int(name, -1) for name in ("left_window_size", "right_window_size"))
        return cls(optional(node, 6), bool(node.attributes.get_int("is_causal", 0)), (left, right))


@dataclass(frozen=True)
class Sizes:
    """Queries, keys, and how many keys stand before the first query."""

    queries: int
    keys: int
    offset: int


def causal_positions(b: Builder, sizes: Sizes) -> tuple[ir.Value, ir.Value]:
    """Positions of queries and keys: a key is visible to queries that do not stand before it."""
    queries = np.arange(sizes.offset, sizes.offset + sizes.queries, dtype=np.int64)
    return b.constant(queries), b.constant(np.arange(sizes.keys, dtype=np.int64))


def _visibility(
    node: ir.Node, b: Builder, sizes: Sizes, dtype: ir.DataType
) -> tuple[ir.Value | None, tuple[ir.Value, ir.Value] | None]:
    """The mask of an ONNX Attention, and the positions where causality is data of its own."""
    mask, limits = _given_mask(node, b, sizes.keys), _Limits.of(node)
    if limits.valid is None and limits.windows == (-1, -1):
        return mask, causal_positions(b, sizes) if limits.causal else None
    for visible in _conditions(b, sizes, limits):
        mask = _both(b, visible, mask, dtype)
    return mask, None


def _masks(node: ir.Node, b: Builder, sizes: Sizes) -> tuple[ir.Value | None, list[ir.Value]]:
    """What is added to the scores, and everything else that hides keys."""
    mask, visible = _given_mask(node, b, sizes.keys), _conditions(b, sizes, _Limits.of(node))
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        return None, [*visible, mask]
    return mask, visible


def _given_mask(node: ir.Node, b: Builder, keys: int) -> ir.Value | None:
    """`attn_mask` with rank 4; keys that it says nothing of are hidden."""
    mask = optional(node, 3)
    if mask is None:
        return None
    shape = shape_of(mask)
    if len(shape) < 4:
        mask = b.reshape(mask, *[1] * (4 - len(shape)), *shape)
    missing = keys - shape[-1]
    if missing > 0:
        hidden = np.array(False if mask.dtype == ir.DataType.BOOL else -np.inf)
        rest = b.own("Expand", [b.constant(hidden, dtype_of(mask))], (*shape_of(mask)[:3], missing))
        mask = b.op("Concat", mask, rest, axis=3)
    return mask


def _conditions(b: Builder, sizes: Sizes, limits: _Limits) -> list[ir.Value]:
    """What the limits allow: booleans that broadcast to `[b, 1, s, t]`."""
    valid = limits.valid
    key = b.constant(np.arange(sizes.keys, dtype=np.int64).reshape(1, 1, 1, -1))
    first = sizes.offset if valid is None else -sizes.queries
    query = b.constant(np.arange(first, first + sizes.queries, dtype=np.int64).reshape(1, 1, -1, 1))
    found = []
    if valid is not None:
        count = b.reshape(valid, shape_of(valid)[0], 1, 1, 1)
        query = b.op("Add", query, count)
        found.append(b.op("Less", key, count))
    left, right = limits.windows
    if limits.causal:
        found.append(b.op("LessOrEqual", key, query))
    if left >= 0:
        found.append(b.op("LessOrEqual", b.op("Sub", query, b.constant(np.int64(left))), key))
    if right >= 0:
        found.append(b.op("LessOrEqual", key, b.op("Add", query, b.constant(np.int64(right)))))
    return found


def _both(b: Builder, visible: ir.Value, mask: ir.Value | None, dtype: ir.DataType) -> ir.Value:
    if mask is None:
        return visible
    if mask.dtype == ir.DataType.BOOL:
        return b.op("And", visible, mask)
    return b.op("Where", visible, mask, b.constant(-np.inf, dtype))


# --- rotary embedding ---------------------------------------------------------------------------------------


def rotary_embedding(node: ir.Node, b: Builder) -> bool:
    """Tables of the positions, then a rotation of the first dims of each head."""
    x = present(node, 0)
    shape = shape_of(x)
    cos, sin = (_table(node, b, i, by_head=len(shape) == 4) for i in (1, 2))
    if len(shape) == 3:
        heads = node.attributes.get_int("num_heads", 0)
        if heads <= 0 or shape[2] % heads:
            raise ModelError(
                f"{label(node)} has num_heads = {heads}, which does not divide the width of '{x.name}' {list(shape)}",
                code="OM1304",
            )
        x = b.reshape(x, shape[0], shape[1], heads, shape[2] // heads)
    y = rotate(
        b,
        x,
        cos,
        sin,
        dims=node.attributes.get_int("rotary_embedding_dim", 0),
        interleaved=node.attributes.get_int("interleaved", 0),
    )
    b.replace(b.reshape(y, *shape) if len(shape) == 3 else y)
    return True


def rotate(b: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, *, dims: int, interleaved: int) -> ir.Value:
    """Rotate the first `dims` of the last dim of `x` (0: all of it); the rest passes."""
    width = shape_of(x)[3]
    if not 0 < dims < width:
        return b.node(DOMAIN, "Rotary", [x, cos, sin], {"interleaved": interleaved}).outputs[0]
    turned = b.slice(x, 3, 0, dims)
    turned = b.node(DOMAIN, "Rotary", [turned, cos, sin], {"interleaved": interleaved}).outputs[0]
    return b.op("Concat", turned, b.slice(x, 3, dims, width), axis=3)


def _table(node: ir.Node, b: Builder, index: int, *, by_head: bool) -> ir.Value:
    """A table of `[b, s, d / 2]`, taken at the positions where there are any, with a dim for the heads."""
    table, positions = present(node, index), optional(node, 3)
    return table_at(b, table, positions, by_head=by_head)


def table_at(b: Builder, table: ir.Value, positions: ir.Value | None, *, by_head: bool) -> ir.Value:
    """The rows of a table at `positions` `[b, s]`; the dim of the heads stands before or after the sequence."""
    if positions is not None:
        table = b.op("Gather", table, positions, axis=0)
    batch, length, half = shape_of(table)
    return b.reshape(table, *((batch, 1, length, half) if by_head else (batch, length, 1, half)))


ATTENTION_RULES: dict[str, Rule] = {"Attention": attention, "RotaryEmbedding": rotary_embedding}
