"""The attention family of `com.microsoft`, expanded to the normal form's Attention and Rotary."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import constant, dtype_of, label, optional, present, shape_of
from onnxmesh.passes.normalise.attention import (
    Sizes,
    attend,
    causal_positions,
    join_heads,
    rotate,
    split_heads,
    table_at,
)

QKV = tuple[ir.Value, ir.Value, ir.Value]


def _unsupported(node: ir.Node, what: str, hint: str = "export the model without it") -> ModelError:
    return ModelError(f"{label(node)} {what}, which is not supported", hint=hint)


def _scale(node: ir.Node, q: ir.Value) -> float:
    given = node.attributes.get_float("scale", 0.0)
    return float(given) if given else 1.0 / math.sqrt(shape_of(q)[3])


def _used(node: ir.Node, index: int) -> bool:
    output = node.outputs[index] if index < len(node.outputs) else None
    return output is not None and bool(output.uses() or output.is_graph_output())


# --- MultiHeadAttention -------------------------------------------------------------------------------------


def multi_head_attention(node: ir.Node, b: Builder) -> None:
    """Heads as a dim; bias, cache, padding mask and attention bias in front of Attention.

    Raises:
        ModelError: the node uses a beam cache, a packed padding mask, or gives out its scores.
    """
    for index, what in ((8, "keeps its cache in a shared buffer"), (9, "has a beam cache")):
        if optional(node, index) is not None:
            raise _unsupported(node, what)
    if _used(node, 3):
        raise _unsupported(node, "gives out its scores")
    q, k, v = _heads(node, b)
    past = optional(node, 6)
    if past is not None:
        k = b.op("Concat", past, k, axis=2)
        v = b.op("Concat", present(node, 7), v, axis=2)
    y = _masked_attention(node, b, (q, k, v), optional(node, 4), optional(node, 5))
    b.replace(join_heads(b, y), *[k, v, None][: len(node.outputs) - 1])


def _heads(node: ir.Node, b: Builder) -> QKV:
    """Q, K and V as `[b, h, s, d]`, biased, from whichever packing they come in."""
    heads = node.attributes.get_int("num_heads", 0)
    query, key, value = present(node, 0), optional(node, 1), optional(node, 2)
    bias = optional(node, 3)
    if len(shape_of(query)) == 5:
        return _unpacked(node, b, query, 3, bias)  # type: ignore[return-value]  # three pieces
    q = query
    if key is None:
        raise _unsupported(node, "has no keys beside an unpacked query")
    if len(shape_of(key)) == 5:
        k, v = _unpacked(node, b, key, 2, None)
        return split_heads(b, _biased(b, q, bias, 0), heads), k, v
    if value is None:
        raise _unsupported(node, "has no values")
    if len(shape_of(key)) == 4:
        return split_heads(b, _biased(b, q, bias, 0), heads), key, value
    width, key_width = shape_of(q)[2], shape_of(key)[2]
    return (
        split_heads(b, _biased(b, q, bias, 0), heads),
        split_heads(b, _biased(b, key, bias, width), heads),
        split_heads(b, _biased(b, value, bias, width + key_width), heads),
    )


def _biased(b: Builder, x: ir.Value, bias: ir.Value | None, start: int) -> ir.Value:
    """`x` plus its part of the joint bias."""
    if bias is None:
        return x
    return b.op("Add", x, b.slice(bias, 0, start, start + shape_of(x)[2]))


def _unpacked(node: ir.Node, b: Builder, packed: ir.Value, count: int, bias: ir.Value | None) -> tuple[ir.Value, ...]:
    """The pieces of `[b, s, h, count, d]`, each `[b, h, s, d]`."""
    if bias is not None:
        raise _unsupported(node, "has a bias on packed inputs")
    batch, length, heads, _, width = shape_of(packed)
    pieces = (b.slice(packed, 3, i, i + 1) for i in range(count))
    return tuple(b.transpose(b.reshape(p, batch, length, heads, width), 0, 2, 1, 3) for p in pieces)


def _masked_attention(node: ir.Node, b: Builder, qkv: QKV, padding: ir.Value | None, bias: ir.Value | None) -> ir.Value:
    """Attention with ONNX Runtime's padding mask, an additive number, and its attention bias."""
    q, k, _ = qkv
    sizes = Sizes(shape_of(q)[2], shape_of(k)[2], shape_of(k)[2] - shape_of(q)[2])
    mask = bias
    if padding is not None:
        hidden = _padding_mask(node, b, padding, dtype_of(q), sizes)
        mask = hidden if bias is None else b.op("Add", bias, hidden)
    causal = bool(node.attributes.get_int("unidirectional", 0))
    return attend(b, qkv, mask, causal_positions(b, sizes) if causal else None, scale=_scale(node, q))


def _padding_mask(node: ir.Node, b: Builder, mask: ir.Value, dtype: ir.DataType, sizes: Sizes) -> ir.Value:
    """A mask of `[b, t]` or `[b, s, t]` ones and zeros as numbers to add to the scores."""
    shape = shape_of(mask)
    if len(shape) not in (2, 3) or shape[-1] != sizes.keys:
        raise _unsupported(node, f"has a padding mask of shape {list(shape)}", "give one of [batch, keys]")
    rank4 = b.reshape(mask, shape[0], 1, *((1, shape[1]) if len(shape) == 2 else shape[1:]))
    seen = b.op("Cast", rank4, to=int(ir.DataType.BOOL))
    hidden = node.attributes.get_float("mask_filter_value", -10000.0)
    return b.op("Where", seen, b.constant(0.0, dtype), b.constant(hidden, dtype))


def attention(node: ir.Node, b: Builder) -> None:
    """The older Attention: one matmul makes Q, K and V.

    Raises:
        ModelError: the node has a cache or rotates.
    """
    if optional(node, 4) is not None or optional(node, 6) is not None or _used(node, 1):
        raise _unsupported(node, "has a cache")
    if node.attributes.get_int("do_rotary", 0):
        raise _unsupported(node, "rotates its queries and keys")
    heads = node.attributes.get_int("num_heads", 0)
    packed = b.op("MatMul", present(node, 0), present(node, 1))
    bias = optional(node, 2)
    if bias is not None:
        packed = b.op("Add", packed, bias)
    width = shape_of(packed)[2]
    widths = list(node.attributes.get_ints("qkv_hidden_sizes", ()) or [width // 3] * 3)
    stops = [sum(widths[: i + 1]) for i in range(3)]
    q, k, v = (split_heads(b, b.slice(packed, 2, stop - size, stop), heads) for stop, size in zip(stops, widths))
    y = _masked_attention(node, b, (q, k, v), optional(node, 3), optional(node, 5))
    b.replace(join_heads(b, y), *[None] * (len(node.outputs) - 1))


# --- GroupQueryAttention ------------------------------------------------------------------------------------


def group_query_attention(node: ir.Node, b: Builder) -> None:
    """Causal attention of grouped heads, rotated where it asks, over a cache whose length is known.

    Raises:
        ModelError: the length of the cache depends on data, or the node uses a variant of softmax or of the cache.
    """
    for name in ("smooth_softmax", "qk_output"):
        if node.attributes.get_int(name, 0) > 0:
            raise _unsupported(node, f"has {name}")
    if optional(node, 11) is not None:
        raise _unsupported(node, "has a head sink")
    q, k, v = _grouped_heads(node, b)
    past = _past_length(node, shape_of(q))
    if node.attributes.get_int("do_rotary", 0):
        q, k = (_turned(node, b, x, past) for x in (q, k))
    q, k, v = (b.transpose(x, 0, 2, 1, 3) for x in (q, k, v))
    present_k, present_v = (_cached(b, optional(node, 3 + i), x, past) for i, x in enumerate((k, v)))
    length = shape_of(q)[2]
    sizes = Sizes(length, past + length, past)
    y = attend(
        b,
        (q, _first(b, present_k, sizes.keys), _first(b, present_v, sizes.keys)),
        _bias_in_window(node, b, sizes, dtype_of(q)),
        causal_positions(b, sizes),
        scale=_scale(node, q),
        softcap=node.attributes.get_float("softcap", 0.0),
    )
    b.replace(join_heads(b, y), *[present_k, present_v, None][: len(node.outputs) - 1])


def _grouped_heads(node: ir.Node, b: Builder) -> QKV:
    """Q, K and V as `[b, s, h, d]`, from one packed input or three."""
    heads, groups = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    query, key, value = present(node, 0), optional(node, 1), optional(node, 2)
    batch, length, width = shape_of(query)
    if key is None or value is None:
        size = width // (heads + 2 * groups)
        ends = (0, heads * size, (heads + groups) * size, width)
        query, key, value = (b.slice(query, 2, ends[i], ends[i + 1]) for i in range(3))
    counts = (heads, groups, groups)
    q, k, v = (b.reshape(x, batch, length, n, shape_of(x)[2] // n) for x, n in zip((query, key, value), counts))
    return q, k, v


def _past_length(node: ir.Node, query: tuple[int, ...]) -> int:
    """How many keys the cache holds; known where all sequences of the batch are as long as the longest."""
    total, ends = constant(optional(node, 6)), constant(optional(node, 5))
    batch, length = query[0], query[1]
    if optional(node, 3) is None:
        return 0
    if total is None:
        raise _unsupported(
            node, "has a total_sequence_length that depends on data", "bind the length of the attention mask"
        )
    longest = int(total.reshape(-1)[0])
    equal = ends is not None and bool(np.all(ends == longest - 1))
    if batch > 1 and not equal:
        raise _unsupported(
            node, "has seqlens_k that may differ in a batch, over a cache", "compile for batch 1, or without a cache"
        )
    if not length <= longest:
        raise ModelError(f"{label(node)} has {length} queries, but total_sequence_length is {longest}")
    return longest - length


def _turned(node: ir.Node, b: Builder, x: ir.Value, past: int) -> ir.Value:
    """`x`, `[b, s, h, d]`, rotated by its positions."""
    positions, length = optional(node, 9), shape_of(x)[1]
    tables = [present(node, i) for i in (7, 8)]
    if positions is None:
        rows = [b.slice(t, 0, past, past + length) for t in tables]
        tables = [b.reshape(t, 1, length, 1, shape_of(t)[1]) for t in rows]
    else:
        tables = [table_at(b, t, positions, by_head=False) for t in tables]
    interleaved = node.attributes.get_int("rotary_interleaved", 0)
    return rotate(b, x, *tables, dims=2 * shape_of(tables[0])[3], interleaved=interleaved)


def _cached(b: Builder, cache: ir.Value | None, x: ir.Value, past: int) -> ir.Value:
    """The cache with `x` after its first `past` entries; a longer buffer keeps its length."""
    if cache is None:
        return x
    size, stop = shape_of(cache)[2], past + shape_of(x)[2]
    pieces = [b.slice(cache, 2, 0, past) if past < size else cache, x]
    if stop < size:
        pieces.append(b.slice(cache, 2, stop, size))
    return b.op("Concat", *pieces, axis=2)


def _first(b: Builder, cache: ir.Value, keys: int) -> ir.Value:
    """The part of a cache that is filled."""
    return cache if shape_of(cache)[2] == keys else b.slice(cache, 2, 0, keys)


def _bias_in_window(node: ir.Node, b: Builder, sizes: Sizes, dtype: ir.DataType) -> ir.Value | None:
    """The attention bias, and the window as a mask: a query sees itself and the keys just before it."""
    bias, window = optional(node, 10), node.attributes.get_int("local_window_size", -1)
    if window < 0 or window >= sizes.keys:
        return bias
    query = b.constant(np.arange(sizes.offset, sizes.offset + sizes.queries, dtype=np.int64).reshape(1, 1, -1, 1))
    key = b.constant(np.arange(sizes.keys, dtype=np.int64).reshape(1, 1, 1, -1))
    near = b.op("Less", b.op("Sub", query, b.constant(np.int64(window))), key)
    return near if bias is None else b.op("Where", near, bias, b.constant(-np.inf, dtype))


# --- RotaryEmbedding ----------------------------------------------------------------------------------------


def rotary_embedding(node: ir.Node, b: Builder) -> None:
    """As ONNX's, with its inputs in another order, and positions that may be one offset.

    Raises:
        ModelError: the batch is packed.
    """
    if node.attributes.get_int("is_packed_batching", 0):
        raise _unsupported(node, "has a packed batch")
    x, positions, cos = present(node, 0), present(node, 1), present(node, 2)
    shape, dims = shape_of(x), node.attributes.get_int("rotary_embedding_dim", 0)
    by_head = len(shape) == 4
    length = shape[2] if by_head else shape[1]
    if shape_of(positions) != (shape[0], length):
        steps = b.constant(np.arange(length, dtype=np.int64).reshape(1, -1))
        positions = b.op("Add", b.reshape(positions, 1, 1), steps)
    tables = [table_at(b, present(node, i), positions, by_head=by_head) for i in (2, 3)]
    if not by_head:
        heads = node.attributes.get_int("num_heads", 0) or shape[2] // (2 * shape_of(cos)[1])
        x = b.reshape(x, shape[0], length, heads, shape[2] // heads)
    y = rotate(b, x, *tables, dims=dims, interleaved=node.attributes.get_int("interleaved", 0))
    b.replace(y if by_head else b.reshape(y, *shape))


ATTENTION_EXPANSIONS: dict[str, Callable[[ir.Node, Builder], None]] = {
    "Attention": attention,
    "MultiHeadAttention": multi_head_attention,
    "GroupQueryAttention": group_query_attention,
    "RotaryEmbedding": rotary_embedding,
}
