"""BERT: norms after the residual, exact GELU, a padding mask, a pooled output."""

from __future__ import annotations

import numpy as np
import onnx

from onnxmesh.models.builder import Dim, GraphBuilder
from onnxmesh.models.layers import (
    Heads,
    attention,
    embedding,
    gelu,
    gemm,
    layer_norm,
    linear_bias,
    merge_heads,
    split_heads,
    visible,
)
from onnxmesh.models.weights import Weights


def bert(
    *,
    layers: int,
    hidden: int,
    heads: int,
    intermediate: int,
    vocab: int,
    positions: int = 512,
    batch: Dim = "batch",
    seq: Dim = "seq",
    epsilon: float = 1e-12,
    dtype: str = "float32",
    opset: int = 23,
    weights: Weights | None = None,
) -> onnx.ModelProto:
    """An encoder from token ids to the last hidden state and the pooled first token."""
    g = GraphBuilder("bert", dtype=dtype, opset=opset, weights=weights)
    ids = g.input("input_ids", "int64", batch, seq)
    keep = g.input("attention_mask", "int64", batch, seq)
    g.size_from(batch, ids, 0)
    g.size_from(seq, keep, 1)

    x = embeddings(g, ids, batch, seq, vocab, positions, hidden)
    last = "last_hidden_state"
    x = layer_norm(g, x, "embeddings.LayerNorm", hidden, epsilon, out="" if layers else last)
    mask = visible(g, keep, batch, seq, causal=False)
    sizes = Heads(batch, heads, seq, seq, hidden // heads)
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        attended = self_attention(g, x, f"{name}.attention", hidden, sizes, mask)
        residual = g.op("Add", attended, x)
        x = layer_norm(g, residual, f"{name}.attention.output.LayerNorm", hidden, epsilon)
        inner = gelu(g, linear_bias(g, x, f"{name}.intermediate.dense", hidden, intermediate))
        residual = g.op("Add", linear_bias(g, inner, f"{name}.output.dense", intermediate, hidden), x)
        out = last if layer == layers - 1 else ""
        x = layer_norm(g, residual, f"{name}.output.LayerNorm", hidden, epsilon, out=out)
    first = g.op("Gather", x, 0, axis=1)
    g.op("Tanh", gemm(g, first, "pooler.dense", hidden, hidden), out="pooler_output")
    g.output(last, batch, seq, hidden)
    g.output("pooler_output", batch, hidden)
    return g.proto


def embeddings(g: GraphBuilder, ids: str, batch: Dim, seq: Dim, vocab: int, positions: int, hidden: int) -> str:
    """Words, token types (all of the first) and positions, the last two by way of stored tables of ids."""
    places = g.constant(np.arange(positions)[None], "int64")
    places = g.op("Slice", places, [0], g.shape(seq), [1], [1])
    types = g.op("GatherElements", g.constant(np.zeros((1, positions)), "int64"), places, axis=1)
    types = g.op("Expand", types, g.shape(batch, seq))
    words = embedding(g, ids, "embeddings.word_embeddings", vocab, hidden)
    typed = g.op("Add", words, embedding(g, types, "embeddings.token_type_embeddings", 2, hidden))
    return g.op("Add", typed, embedding(g, places, "embeddings.position_embeddings", positions, hidden))


def self_attention(g: GraphBuilder, x: str, name: str, hidden: int, sizes: Heads, mask: str) -> str:
    batch, seq, width = sizes.batch, sizes.queries, sizes.width
    q, k, v = [
        split_heads(g, linear_bias(g, x, f"{name}.self.{part}", hidden, hidden), batch, seq, width)
        for part in ("query", "key", "value")
    ]
    mixed = attention(g, q, k, v, sizes, mask=mask, with_scale=True)
    return linear_bias(g, merge_heads(g, mixed, batch, seq), f"{name}.output.dense", hidden, hidden)
