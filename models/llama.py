"""Llama: RMSNorm, rotary embeddings on halves, grouped key and value heads, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from onnxmesh.models.builder import Dim, GraphBuilder
from onnxmesh.models.layers import (
    Heads,
    attention,
    embedding,
    linear,
    merge_heads,
    rms_norm,
    silu,
    split_heads,
    visible,
)
from onnxmesh.models.weights import Weights


def llama(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    batch: Dim = "batch",
    seq: Dim = "seq",
    head_dim: int = 0,
    rope_theta: float = 10000.0,
    epsilon: float = 1e-6,
    attention_mask: bool = True,
    position_ids: bool | None = None,
    dtype: str = "float32",
    opset: int = 23,
    weights: Weights | None = None,
) -> onnx.ModelProto:
    """A causal language model from token ids to logits.

    Args:
        head_dim: the width of a head; hidden / heads if 0.
        attention_mask: whether there is such an input; without it attention is plainly causal.
        position_ids: whether there is such an input; by default from opset 23 on, where the rotary operator
            needs tables with the batch in them.
    """
    g = GraphBuilder("llama", dtype=dtype, opset=opset, weights=weights)
    width = head_dim or hidden // heads
    positioned = opset >= 23 if position_ids is None else position_ids
    ids = g.input("input_ids", "int64", batch, seq)
    keep = g.input("attention_mask", "int64", batch, seq) if attention_mask else ""
    places = g.input("position_ids", "int64", batch, seq) if positioned else ""
    g.size_from(batch, ids, 0)
    g.size_from(seq, keep or ids, 1)

    x = embedding(g, ids, "model.embed_tokens", vocab, hidden)
    mask = visible(g, keep, batch, seq, causal=True) if keep else ""
    rotary = Rotary.of(g, places, seq, width, rope_theta)
    sizes = Heads(batch, heads, seq, seq, width)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        normal = rms_norm(g, x, f"{name}.input_layernorm", hidden, epsilon, weight_first=True)
        attended = self_attention(g, normal, f"{name}.self_attn", hidden, kv_heads, sizes, rotary, mask)
        x = g.op("Add", x, attended)
        normal = rms_norm(g, x, f"{name}.post_attention_layernorm", hidden, epsilon, weight_first=True)
        x = g.op("Add", x, swiglu(g, normal, f"{name}.mlp", hidden, intermediate))
    x = rms_norm(g, x, "model.norm", hidden, epsilon, weight_first=True)
    linear(g, x, "lm_head", hidden, vocab, out="logits")
    g.output("logits", batch, seq, vocab)
    return g.proto


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings: by the operator from the angles, or in small operators from two tables."""

    width: int
    angles: str
    cosine: str = ""
    sine: str = ""

    @classmethod
    def of(cls, g: GraphBuilder, places: str, seq: Dim, width: int, theta: float) -> Rotary:
        column = g.unsqueeze(places, 2) if places else g.unsqueeze(g.arange(seq), 0, 2)
        frequencies = theta ** -(np.arange(0, width, 2) / width)
        angles = g.op("Mul", g.cast(column, "float32"), g.constant(frequencies, "float32"))
        if g.opset >= 23 and places and not g.low:
            return cls(width, angles)
        double = g.op("Concat", angles, angles, axis=-1)
        tables = [g.op("Cos", double), g.op("Sin", double)]
        cosine, sine = [g.unsqueeze(g.down(table), 1) for table in tables]
        return cls(width, angles, cosine, sine)

    def apply(self, g: GraphBuilder, x: str, heads: int) -> str:
        """Turn [batch, heads, tokens, width]."""
        if not self.cosine:
            tables = g.op("Cos", self.angles), g.op("Sin", self.angles)
            return g.op("RotaryEmbedding", x, *tables, interleaved=0, num_heads=heads)
        half = self.width // 2
        straight = g.op("Mul", x, self.cosine)
        first, second = g.slice(x, 3, 0, half), g.slice(x, 3, half)
        crossed = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.op("Add", straight, g.op("Mul", crossed, self.sine))


def self_attention(
    g: GraphBuilder, x: str, name: str, hidden: int, kv_heads: int, sizes: Heads, rotary: Rotary, mask: str
) -> str:
    batch, seq, heads, width = sizes.batch, sizes.queries, sizes.heads, sizes.width
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    q, k, v = [
        split_heads(g, linear(g, x, f"{name}.{part}_proj", hidden, count * width), batch, seq, width)
        for part, count in counts.items()
    ]
    q, k = rotary.apply(g, q, heads), rotary.apply(g, k, kv_heads)
    if kv_heads != heads:
        k, v = (repeat_heads(g, part, kv_heads, sizes) for part in (k, v))
    mixed = attention(g, q, k, v, sizes, mask=mask, causal=not mask, with_scale=True)
    return linear(g, merge_heads(g, mixed, batch, seq), f"{name}.o_proj", heads * width, hidden)


def repeat_heads(g: GraphBuilder, x: str, kv_heads: int, sizes: Heads) -> str:
    """Each key or value head once for every query head of its group."""
    group = sizes.heads // kv_heads
    shape = g.shape(sizes.batch, kv_heads, group, sizes.keys, sizes.width)
    expanded = g.op("Expand", g.unsqueeze(x, 2), shape)
    return g.reshape(expanded, sizes.batch, sizes.heads, sizes.keys, sizes.width)


def swiglu(g: GraphBuilder, x: str, name: str, hidden: int, intermediate: int) -> str:
    gate = silu(g, linear(g, x, f"{name}.gate_proj", hidden, intermediate))
    up = linear(g, x, f"{name}.up_proj", hidden, intermediate)
    return linear(g, g.op("Mul", gate, up), f"{name}.down_proj", intermediate, hidden)
