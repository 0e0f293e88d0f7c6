"""GroupQueryAttention of `com.microsoft`: grouped heads over a cache, as decoders for ONNX Runtime GenAI have it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import DOMAIN, constant, dtype_of, label, optional, present, set_type, shape_of
from onnxmesh.passes.normalise.attention import join_heads, rotate, table_at
from onnxmesh.passes.normalise.microsoft.cache import Fill, fill_of, insert, positions, seen
from onnxmesh.passes.normalise.microsoft.norms import used
from onnxmesh.passes.normalise.microsoft.scores import (
    QKV,
    Softmax,
    attention_of,
    scale_of,
    scores_of,
    weights_of,
)

BEFORE_SOFTMAX, AFTER_SOFTMAX = 1, 2


@dataclass(frozen=True)
class Keys:
    """How many keys there are.

    Attributes:
        past: how many were there before.
        held: the length of the caches that are given out.
        total: how many of these the attention looks at.
    """

    past: Fill
    held: int
    total: int


def group_query_attention(node: ir.Node, b: Builder) -> None:
    """Attention of grouped heads, normalised and rotated where it asks, over a cache.

    Raises:
        ModelError: the lengths contradict each other; the cache holds a window only, or numbers of less than 8 bits.
    """
    if node.attributes.get_int("sliding_window_cache", 0):
        raise ModelError(
            f"{label(node)} keeps only a window of its cache (sliding_window_cache), which is not supported",
            hint="export it with a cache of the full length; local_window_size may stay",
            code="OM1303",
        )
    q, k, v = _heads(node, b)
    keys = _keys(node, b, shape_of(q))
    q, k = (_normalised(node, b, x, 14 + i) for i, x in enumerate((q, k)))
    if node.attributes.get_int("do_rotary", 0):
        q, k = (_turned(node, b, x, keys.past) for x in (q, k))
    q, k, v = (b.transpose(x, 0, 2, 1, 3) for x in (q, k, v))
    caches = [_cached(node, b, x, i, keys) for i, x in enumerate((k, v))]
    k, v = (_loaded(node, b, _first(b, cache, keys.total), i, dtype_of(q)) for i, cache in enumerate(caches))
    causal = bool(node.attributes.get_int("causal", 1))
    window = node.attributes.get_int("local_window_size", -1)
    visible = seen(b, keys.past, shape_of(q)[2], keys.total, causal=causal, window=window)
    softmax = Softmax(scale_of(node, shape_of(q)[3]), node.attributes.get_float("softcap", 0.0), _sink(node, b, q))
    bias = _bias(node, b, keys.total)
    y = attention_of(b, (q, k, v), bias, visible, softmax)
    scores = None
    if used(node, 3):
        scores = scores_of(b, (q, k, v), bias, visible, softmax, -np.inf)
        if node.attributes.get_int("qk_output", 0) == AFTER_SOFTMAX:
            scores = weights_of(b, scores, softmax.sink)
    b.replace(join_heads(b, y), *[*caches, scores][: len(node.outputs) - 1])


def _heads(node: ir.Node, b: Builder) -> QKV:
    """Q, K and V as `[b, s, h, d]`, from one packed input or three."""
    heads, groups = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    query, key, value = present(node, 0), optional(node, 1), optional(node, 2)
    batch, _, width = shape_of(query)
    if key is None or value is None:
        size = width // (heads + 2 * groups)
        made = b.node(DOMAIN, "Split", [query], {"axis": 2}, 3).outputs
        for piece, count in zip(made, (heads, groups, groups)):
            set_type(piece, query.dtype, (batch, shape_of(query)[1], count * size))
        query, key, value = made
    counts = (heads, groups, groups)
    q, k, v = (b.reshape(x, batch, shape_of(x)[1], n, shape_of(x)[2] // n) for x, n in zip((query, key, value), counts))
    return q, k, v


# --- how long the cache is ----------------------------------------------------------------------------------


def _keys(node: ir.Node, b: Builder, query: tuple[int, ...]) -> Keys:
    """The lengths, where `total_sequence_length` is known; where it is data the whole buffer is looked at.

    Raises:
        ModelError: the lengths are none that ONNX Runtime takes.
    """
    cache, length = optional(node, 3), query[1]
    held = 0 if cache is None else shape_of(cache)[2]
    given, bias = constant(optional(node, 6)), optional(node, 10)
    total = int(given.reshape(-1)[0]) if given is not None else None
    if total is None and bias is not None:
        total = shape_of(bias)[3]
    past = _past(node, b, query, held, total)
    if held == 0:
        return Keys(past, length, length)
    if total is None:
        return Keys(past, held, held)
    if total < length:
        raise ModelError(f"{label(node)} has {length} queries, but total_sequence_length is {total}", code="OM1311")
    return Keys(past, max(held, total), total)


def _past(node: ir.Node, b: Builder, query: tuple[int, ...], held: int, total: int | None) -> Fill:
    """How many keys the cache holds: those of `seqlens_k` but the new ones; none where all are new."""
    batch, length = query[0], query[1]
    if held == 0 or total == length:
        return Fill(0)
    if batch == 1 or length == 1:
        return fill_of(b, present(node, 5), length - 1)
    if total is None:
        return Fill(0)
    raise ModelError(
        f"{label(node)} has {batch} sequences of {length} tokens and a total_sequence_length of {total}: several new "
        "tokens behind a cache must be of one sequence",
        hint="compile for batch 1, or for one new token",
        code="OM1303",
    )


def _cached(node: ir.Node, b: Builder, x: ir.Value, index: int, keys: Keys) -> ir.Value:
    """The cache of keys (0) or values (1) with the new ones in it."""
    cache, new = optional(node, 3 + index), _stored(node, b, x, index)
    return new if cache is None else insert(b, cache, new, keys.past, keys.held)


def _first(b: Builder, cache: ir.Value, keys: int) -> ir.Value:
    """The part of a cache that is looked at."""
    return cache if shape_of(cache)[2] == keys else b.slice(cache, 2, 0, keys)


# --- what is done to queries, keys, values and scores -------------------------------------------------------


def _normalised(node: ir.Node, b: Builder, x: ir.Value, index: int) -> ir.Value:
    """`x` with RMS normalization of every head, where it has a weight."""
    weight = optional(node, index)
    if weight is None:
        return x
    return b.op("RMSNormalization", x, weight, axis=-1, epsilon=node.attributes.get_float("qk_norm_epsilon", 1e-6))


def _turned(node: ir.Node, b: Builder, x: ir.Value, past: Fill) -> ir.Value:
    """`x`, `[b, s, h, d]`, rotated by its positions."""
    given, length = optional(node, 9), shape_of(x)[1]
    tables = [present(node, i) for i in (7, 8)]
    if given is None and isinstance(past.count, int):
        rows = [b.slice(t, 0, past.count, past.count + length) for t in tables]
        tables = [b.reshape(t, 1, length, 1, shape_of(t)[1]) for t in rows]
    else:
        at = positions(b, past, length) if given is None else given
        tables = [table_at(b, t, at, by_head=False) for t in tables]
    interleaved = node.attributes.get_int("rotary_interleaved", 0)
    return rotate(b, x, *tables, dims=2 * shape_of(tables[0])[3], interleaved=interleaved)


def _sink(node: ir.Node, b: Builder, q: ir.Value) -> ir.Value | None:
    """One more score of every head: given, or 0 with `smooth_softmax`."""
    sink = optional(node, 11)
    if sink is None and node.attributes.get_int("smooth_softmax", -1) > 0:
        return b.constant(np.zeros(shape_of(q)[1]), dtype_of(q))
    return sink


def _bias(node: ir.Node, b: Builder, keys: int) -> ir.Value | None:
    """The attention bias, as wide as there are keys."""
    bias = optional(node, 10)
    return bias if bias is None or shape_of(bias)[3] == keys else b.slice(bias, 3, 0, keys)


# --- a cache of 8 bits --------------------------------------------------------------------------------------


def _scale(node: ir.Node, b: Builder, index: int, dtype: ir.DataType) -> ir.Value | None:
    """The scale of a quantised cache of keys (0) or values (1), or None.

    Raises:
        ModelError: the cache is not of int8.
    """
    if node.attributes.get_string(f"{'kv'[index]}_quant_type", "NONE") == "NONE":
        return None
    cache = optional(node, 3 + index)
    if cache is not None and cache.dtype != ir.DataType.INT8:
        raise ModelError(
            f"{label(node)} has a quantised cache of {cache.dtype}, which is not supported",
            hint="export it with a cache of int8 or of floats",
            code="OM1303",
        )
    return b.op("Cast", present(node, 12 + index), to=int(dtype))


def _stored(node: ir.Node, b: Builder, x: ir.Value, index: int) -> ir.Value:
    """New keys or values as their cache holds them."""
    scale = _scale(node, b, index, dtype_of(x))
    if scale is None:
        return x
    limits = (b.constant(n, dtype_of(x)) for n in (-128, 127))
    return b.op("Cast", b.op("Clip", b.op("Round", b.op("Div", x, scale)), *limits), to=int(ir.DataType.INT8))


def _loaded(node: ir.Node, b: Builder, cache: ir.Value, index: int, dtype: ir.DataType) -> ir.Value:
    """A cache as numbers."""
    scale = _scale(node, b, index, dtype)
    return cache if scale is None else b.op("Mul", b.op("Cast", cache, to=int(dtype)), scale)
