"""MultiHeadAttention and the ops before it in `com.microsoft`, expanded to the normal form's Attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder, Expansion
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, shape_of
from onnxmesh.passes.normalise.attention import join_heads, split_heads
from onnxmesh.passes.normalise.microsoft.cache import Fill, Seen, fill_of, insert, seen
from onnxmesh.passes.normalise.microsoft.grouped import group_query_attention
from onnxmesh.passes.normalise.microsoft.norms import used
from onnxmesh.passes.normalise.microsoft.rotary import ROTARY_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.scores import QKV, Softmax, attention_of, scale_of, scores_of

LOWEST = float(np.finfo(np.float32).min)


def _unsupported(node: ir.Node, what: str, hint: str = "export the model without it") -> ModelError:
    return ModelError(f"{label(node)} {what}, which is not supported", hint=hint, code="OM1303")


@dataclass(frozen=True)
class Masks:
    """The inputs that hide keys: a padding mask in one of its forms, and numbers to add to the scores."""

    padding: ir.Value | None
    bias: ir.Value | None


# --- the ops ------------------------------------------------------------------------------------------------


def multi_head_attention(node: ir.Node, b: Builder) -> None:
    """Heads as a dim; bias, cache, padding mask and attention bias in front of Attention.

    Raises:
        ModelError: the node has a beam cache, or inputs that do not go together.
    """
    if optional(node, 9) is not None:
        raise _unsupported(node, "has a beam cache (cache_indirection)")
    q, k, v = _heads(node, b, optional(node, 3))
    caches, past = (optional(node, 6), optional(node, 7)), optional(node, 8)
    _over_cache(node, b, (q, k, v), caches, past, Masks(optional(node, 4), optional(node, 5)))


def decoder_masked_attention(node: ir.Node, b: Builder) -> None:
    """DecoderMaskedMultiHeadAttention: one new token, whose keys and values may be packed behind the query.

    Raises:
        ModelError: the node has a beam cache.
    """
    if optional(node, 9) is not None:
        raise _unsupported(node, "has a beam cache (cache_indirection)")
    q, k, v = _heads(node, b, optional(node, 10))
    caches, past = (optional(node, 5), optional(node, 6)), optional(node, 7)
    cross = optional(node, 1) is not None and len(shape_of(present(node, 1))) == 4
    masks = Masks(optional(node, 3), optional(node, 4))
    _over_cache(node, b, (q, k, v), (None, None) if cross else caches, past, masks)


def attention(node: ir.Node, b: Builder) -> None:
    """The older Attention: one matmul makes Q, K and V; a cache holds keys and values as `[2, b, h, t, d]`.

    Raises:
        ModelError: the node rotates.
    """
    if node.attributes.get_int("do_rotary", 0):
        raise _unsupported(node, "rotates its queries and keys", "export the model with RotaryEmbedding")
    heads, past = node.attributes.get_int("num_heads", 0), optional(node, 4)
    packed = b.op("MatMul", present(node, 0), present(node, 1))
    bias = optional(node, 2)
    if bias is not None:
        packed = b.op("Add", packed, bias)
    width = shape_of(packed)[2]
    widths = list(node.attributes.get_ints("qkv_hidden_sizes", ()) or [width // 3] * 3)
    stops = [sum(widths[: i + 1]) for i in range(3)]
    q, k, v = (split_heads(b, b.slice(packed, 2, stop - size, stop), heads) for stop, size in zip(stops, widths))
    caches = [None if past is None else b.reshape(b.slice(past, 0, i, i + 1), *shape_of(past)[1:]) for i in range(2)]
    fill = _fill(b, caches[0], optional(node, 6))
    k, v = (x if cache is None or fill is None else insert(b, cache, x, fill) for cache, x in zip(caches, (k, v)))
    y, _ = _attend(node, b, (q, k, v), Masks(optional(node, 3), optional(node, 5)), fill)
    both = b.op("Concat", *(b.reshape(x, 1, *shape_of(x)) for x in (k, v)), axis=0) if used(node, 1) else None
    b.replace(join_heads(b, y), *[both][: len(node.outputs) - 1])


# --- queries, keys and values -------------------------------------------------------------------------------


def _heads(node: ir.Node, b: Builder, bias: ir.Value | None) -> QKV:
    """Q, K and V as `[b, h, s, d]`, biased, from whichever packing they come in."""
    heads = node.attributes.get_int("num_heads", 0)
    query, key, value = present(node, 0), optional(node, 1), optional(node, 2)
    if len(shape_of(query)) == 5:
        q, k, v = (_biased_heads(b, x, bias, i) for i, x in enumerate(_unpacked(b, query)))
        return q, k, v
    if key is None:
        width = shape_of(query)[2] // 3
        joint = query if bias is None else b.op("Add", query, bias)
        q, k, v = (split_heads(b, b.slice(joint, 2, i * width, (i + 1) * width), heads) for i in range(3))
        return q, k, v
    q = split_heads(b, _biased(b, query, bias, 0), heads)
    if len(shape_of(key)) == 5:
        k, v = (_biased_heads(b, x, bias, i) for i, x in enumerate(_unpacked(b, key), 1))
        return q, k, v
    if value is None:
        raise _unsupported(node, "has no values")
    if len(shape_of(key)) == 4:
        return q, key, value
    width, key_width = shape_of(query)[2], shape_of(key)[2]
    return (
        q,
        split_heads(b, _biased(b, key, bias, width), heads),
        split_heads(b, _biased(b, value, bias, width + key_width), heads),
    )


def _biased(b: Builder, x: ir.Value, bias: ir.Value | None, start: int) -> ir.Value:
    """`x` plus its part of the joint bias."""
    if bias is None:
        return x
    return b.op("Add", x, b.slice(bias, 0, start, start + shape_of(x)[2]))


def _biased_heads(b: Builder, x: ir.Value, bias: ir.Value | None, part: int) -> ir.Value:
    """`x` `[b, h, s, d]` plus the part of the joint bias for queries (0), keys (1) or values (2)."""
    if bias is None:
        return x
    _, heads, _, width = shape_of(x)
    piece = b.slice(bias, 0, part * heads * width, (part + 1) * heads * width)
    return b.op("Add", x, b.reshape(piece, 1, heads, 1, width))


def _unpacked(b: Builder, packed: ir.Value) -> list[ir.Value]:
    """The pieces of `[b, s, h, count, d]`, each `[b, h, s, d]`."""
    batch, length, heads, count, width = shape_of(packed)
    pieces = [b.slice(packed, 3, i, i + 1) for i in range(count)]
    return [b.transpose(b.reshape(p, batch, length, heads, width), 0, 2, 1, 3) for p in pieces]


# --- the cache ----------------------------------------------------------------------------------------------


def _over_cache(
    node: ir.Node,
    b: Builder,
    qkv: QKV,
    caches: tuple[ir.Value | None, ir.Value | None],
    past: ir.Value | None,
    masks: Masks,
) -> None:
    """Attention over caches with the new keys and values in them; the caches and the scores are outputs 1 to 3."""
    q, k, v = qkv
    fill = _fill(b, caches[0], past)
    k, v = (x if cache is None or fill is None else insert(b, cache, x, fill) for cache, x in zip(caches, (k, v)))
    y, scores = _attend(node, b, (q, k, v), masks, fill)
    given = [k, v] if used(node, 1) or used(node, 2) else [None, None]
    b.replace(join_heads(b, y), *[*given, scores][: len(node.outputs) - 1])


def _fill(b: Builder, cache: ir.Value | None, past: ir.Value | None) -> Fill | None:
    """How much of a cache is filled: all of it, unless `past_sequence_length` says how much of a buffer."""
    if cache is None:
        return None
    return Fill(shape_of(cache)[2]) if past is None else fill_of(b, past)


def _attend(node: ir.Node, b: Builder, qkv: QKV, masks: Masks, fill: Fill | None) -> tuple[ir.Value, ir.Value | None]:
    """Attention with ONNX Runtime's padding mask and its attention bias; and the scores where they are an output."""
    q, k, _ = qkv
    queries, keys = shape_of(q)[2], shape_of(k)[2]
    visible, bias = Seen(), _widened(b, masks.bias, keys)
    causal = bool(node.attributes.get_int("unidirectional", 0))
    if causal or fill is not None:
        visible = seen(b, fill or Fill(0), queries, keys, causal=causal)
    if masks.padding is not None:
        hidden = _padding(node, b, masks.padding, dtype_of(q), (queries, keys), fill or Fill(0))
        bias = hidden if bias is None else bias if hidden is None else b.op("Add", bias, hidden)
    softmax = Softmax(scale_of(node, shape_of(q)[3]))
    y = attention_of(b, qkv, bias, visible, softmax)
    return y, scores_of(b, qkv, bias, visible, softmax, LOWEST) if used(node, 3) else None


def _widened(b: Builder, bias: ir.Value | None, keys: int) -> ir.Value | None:
    """A bias as wide as a buffer: the keys behind are hidden by other means."""
    if bias is None or shape_of(bias)[3] >= keys:
        return bias
    zero = b.constant(0, dtype_of(bias))
    rest = b.own("Expand", [zero], (*shape_of(bias)[:3], keys - shape_of(bias)[3]))
    return b.op("Concat", bias, rest, axis=3)


# --- the padding mask ---------------------------------------------------------------------------------------


def _padding(
    node: ir.Node, b: Builder, mask: ir.Value, dtype: ir.DataType, sizes: tuple[int, int], fill: Fill
) -> ir.Value | None:
    """A padding mask, in any of its forms, as numbers to add to the scores `[b, h, s, t]`.

    Raises:
        ModelError: it has a shape that ONNX Runtime does not describe.
    """
    shape = shape_of(mask)
    if len(shape) == 2 and shape[1] == 1 != sizes[1]:
        return None  # ONNX Runtime's optimiser writes it where there is no mask
    if len(shape) == 1:
        kept = _by_lengths(node, b, mask, sizes[1])
    else:
        kept = b.op("Cast", _by_keys(node, b, mask, sizes, fill), to=int(ir.DataType.BOOL))
    hidden = node.attributes.get_float("mask_filter_value", -10000.0)
    return b.op("Where", kept, b.constant(0.0, dtype), b.constant(hidden, dtype))


def _by_keys(node: ir.Node, b: Builder, mask: ir.Value, sizes: tuple[int, int], fill: Fill) -> ir.Value:
    """A mask of `[b, t]`, `[b, s, t]` or `[b, 1, most, most]` ones and zeros with rank 4."""
    shape, (queries, keys) = shape_of(mask), sizes
    if len(shape) == 4 and isinstance(fill.count, int) and shape[3] >= keys:
        return b.slice(b.slice(mask, 2, fill.count, fill.count + queries), 3, 0, keys)
    if len(shape) in (2, 3) and shape[-1] == keys:
        return b.reshape(mask, shape[0], 1, *((1, keys) if len(shape) == 2 else shape[1:]))
    if len(shape) == 2 and not isinstance(fill.count, int):
        zero = b.constant(0, dtype_of(mask))
        rest = b.own("Expand", [zero], (shape[0], keys - shape[1]))
        return b.reshape(b.op("Concat", mask, rest, axis=1), shape[0], 1, 1, keys)
    raise _unsupported(node, f"has a padding mask of shape {list(shape)}", f"give one of [batch, {keys}]")


def _by_lengths(node: ir.Node, b: Builder, mask: ir.Value, keys: int) -> ir.Value:
    """A mask of `[b]` lengths, `[2 b]` ends and starts, or `[3 b + 2]` lengths and offsets of packed tokens."""
    batch, count = shape_of(present(node, 0))[0], shape_of(mask)[0]
    if count not in (batch, 2 * batch, 3 * batch + 2):
        raise _unsupported(node, f"has a padding mask of shape [{count}]", f"give one of [{batch}]")
    key = b.constant(np.arange(keys, dtype=np.int32).reshape(1, 1, 1, -1))
    ends = b.reshape(b.slice(mask, 0, 0, batch), batch, 1, 1, 1)
    kept = b.op("Less", key, ends)
    if count != 2 * batch:
        return kept
    starts = b.reshape(b.slice(mask, 0, batch, count), batch, 1, 1, 1)
    return b.op("And", kept, b.op("GreaterOrEqual", key, starts))


ATTENTION_EXPANSIONS: dict[str, Expansion] = {
    "Attention": attention,
    "MultiHeadAttention": multi_head_attention,
    "DecoderMaskedMultiHeadAttention": decoder_masked_attention,
    "GroupQueryAttention": group_query_attention,
    **ROTARY_EXPANSIONS,
}
