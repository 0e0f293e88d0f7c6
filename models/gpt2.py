"""GPT-2: norms before each half, one matrix for queries, keys and values, GELU by tanh."""

from __future__ import annotations

import onnx

from onnxmesh.models.builder import Dim, GraphBuilder
from onnxmesh.models.layers import Heads, attention, embedding, gemm, layer_norm, linear, visible
from onnxmesh.models.weights import Weights, lowest


def gpt2(
    *,
    layers: int,
    hidden: int,
    heads: int,
    vocab: int,
    intermediate: int = 0,
    positions: int = 1024,
    batch: Dim = "batch",
    seq: Dim = "seq",
    epsilon: float = 1e-5,
    eager: bool = False,
    dtype: str = "float32",
    opset: int = 23,
    weights: Weights | None = None,
) -> onnx.ModelProto:
    """A causal language model from token ids to logits.

    Args:
        eager: the library's attention in plain tensor code, which is small operators at every opset.
    """
    g = GraphBuilder("gpt2", dtype=dtype, opset=opset, weights=weights)
    ids = g.input("input_ids", "int64", batch, seq)
    keep = g.input("attention_mask", "int64", batch, seq)
    g.size_from(batch, ids, 0)
    g.size_from(seq, keep, 1)

    words = embedding(g, g.reshape(ids, -1, seq), "transformer.wte", vocab, hidden)
    places = g.unsqueeze(g.arange(seq), 0)
    x = g.op("Add", words, embedding(g, places, "transformer.wpe", positions, hidden))
    mask = visible(g, g.reshape(keep, batch, -1), batch, seq, causal=True)
    if eager:
        mask = g.op("Where", mask, 0.0, lowest(dtype))
    sizes = Heads(batch, heads, seq, seq, hidden // heads)
    for layer in range(layers):
        name = f"transformer.h.{layer}"
        normal = layer_norm(g, x, f"{name}.ln_1", hidden, epsilon)
        attended = self_attention(g, normal, f"{name}.attn", hidden, sizes, mask, eager)
        x = g.op("Add", attended, x)
        normal = layer_norm(g, x, f"{name}.ln_2", hidden, epsilon)
        x = g.op("Add", x, mlp(g, normal, f"{name}.mlp", hidden, intermediate or 4 * hidden, batch, seq))
    x = layer_norm(g, x, "transformer.ln_f", hidden, epsilon)
    linear(g, g.reshape(x, -1, seq, hidden), "lm_head", hidden, vocab, out="logits")
    g.output("logits", batch, seq, vocab)
    return g.proto


def conv1d(g: GraphBuilder, x: str, name: str, inputs: int, outputs: int, batch: Dim, seq: Dim) -> str:
    """The library's Conv1D: a linear layer over the tokens as rows of one matrix."""
    rows = g.reshape(x, -1, inputs)
    return g.reshape(gemm(g, rows, name, inputs, outputs, transposed=False), batch, seq, outputs)


def self_attention(g: GraphBuilder, x: str, name: str, hidden: int, sizes: Heads, mask: str, eager: bool) -> str:
    batch, seq, width = sizes.batch, sizes.queries, sizes.width
    fused = conv1d(g, x, f"{name}.c_attn", hidden, 3 * hidden, batch, seq)
    q, k, v = [g.reshape(part, batch, seq, -1, width) for part in g.split(fused, 2, 3)]
    q, v = g.transpose(q, 0, 2, 1, 3), g.transpose(v, 0, 2, 1, 3)
    if eager:
        scores = g.op("Mul", g.op("MatMul", q, g.transpose(k, 0, 2, 3, 1)), width**-0.5)
        mixed = g.op("MatMul", g.op("Softmax", g.op("Add", scores, mask), axis=-1), v)
    else:
        k = g.transpose(k, 0, 2, 1, 3)
        mixed = attention(g, q, k, v, sizes, mask=mask, with_scale=True)
    rows = g.op("Reshape", g.transpose(mixed, 0, 2, 1, 3), [-1, hidden])
    return g.reshape(gemm(g, rows, f"{name}.c_proj", hidden, hidden, transposed=False), batch, seq, hidden)


def mlp(g: GraphBuilder, x: str, name: str, hidden: int, inner: int, batch: Dim, seq: Dim) -> str:
    x = conv1d(g, x, f"{name}.c_fc", hidden, inner, batch, seq)
    half = g.op("Mul", x, 0.5)
    cubed = g.op("Add", x, g.op("Mul", g.op("Pow", x, 3.0), 0.044715))
    tanh = g.op("Tanh", g.op("Mul", cubed, 0.7978845608))
    return conv1d(g, g.op("Mul", half, g.op("Add", tanh, 1.0)), f"{name}.c_proj", inner, hidden, batch, seq)
