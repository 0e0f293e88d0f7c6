"""Layers that several models share, each in the operators that the exporter writes at the graph's opset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxmesh.models.builder import LAST, Dim, GraphBuilder
from onnxmesh.models.weights import lowest

STD = 0.2
"""The spread of biases, and of norm weights around 1."""

# --- linear layers and activations ---


def linear(g: GraphBuilder, x: str, name: str, inputs: int, outputs: int, out: str = "") -> str:
    """A linear layer without a bias."""
    return g.op("MatMul", x, g.matrix(f"{name}.weight", inputs, outputs), out=out)


def linear_bias(g: GraphBuilder, x: str, name: str, inputs: int, outputs: int, out: str = "") -> str:
    product = linear(g, x, name, inputs, outputs)
    return g.op("Add", product, g.weight(f"{name}.bias", outputs, std=STD), out=out)


def gemm(g: GraphBuilder, x: str, name: str, inputs: int, outputs: int, transposed: bool = True) -> str:
    """A linear layer of a matrix; the weight is [outputs, inputs] as torch keeps it, if transposed."""
    shape = (outputs, inputs) if transposed else (inputs, outputs)
    weight = g.matrix(f"{name}.weight", *shape, transposed=transposed)
    bias = g.weight(f"{name}.bias", outputs, std=STD)
    return g.op("Gemm", x, weight, bias, alpha=1.0, beta=1.0, transA=0, transB=int(transposed))


def embedding(g: GraphBuilder, ids: str, name: str, rows: int, width: int) -> str:
    return g.op("Gather", g.weight(f"{name}.weight", rows, width, std=1.0), ids, axis=0)


def silu(g: GraphBuilder, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


def gelu(g: GraphBuilder, x: str) -> str:
    """The exact one, by the error function."""
    if g.opset >= 20:
        return g.op("Gelu", x, approximate="none")
    erf = g.op("Erf", g.op("Div", x, float(np.float32(np.sqrt(2.0)))))
    return g.op("Mul", x, g.op("Mul", 0.5, g.op("Add", erf, 1.0)))


def gelu_tanh(g: GraphBuilder, x: str) -> str:
    if g.opset >= 20:
        return g.op("Gelu", x, approximate="tanh")
    inner = g.op("Add", x, g.op("Mul", 0.044715, g.op("Pow", x, 3.0)))
    tanh = g.op("Tanh", g.op("Mul", float(np.sqrt(2.0 / np.pi)), inner))
    return g.op("Mul", x, g.op("Mul", 0.5, g.op("Add", tanh, 1.0)))


# --- norms ---


def norm_weight(g: GraphBuilder, name: str, width: int, dtype: str = "") -> str:
    return g.weight(f"{name}.weight", width, std=STD, mean=1.0, dtype=dtype)


def layer_norm(g: GraphBuilder, x: str, name: str, width: int, epsilon: float, dtype: str = "", out: str = "") -> str:
    weight = norm_weight(g, name, width, dtype)
    bias = g.weight(f"{name}.bias", width, std=STD, dtype=dtype)
    return g.op("LayerNormalization", x, weight, bias, out=out, axis=-1, epsilon=np.float32(epsilon), stash_type=1)


def plain_layer_norm(g: GraphBuilder, x: str, width: int, epsilon: float, dtype: str = "") -> str:
    """Without weight and bias, for which the exporter writes ones."""
    ones = g.constant(np.ones(width), dtype)
    return g.op("LayerNormalization", x, ones, axis=-1, epsilon=np.float32(epsilon), stash_type=1)


def rms_norm(
    g: GraphBuilder, x: str, name: str, width: int, epsilon: float, axis: int = -1, weight_first: bool = False
) -> str:
    """RMSNorm over the last dim.

    Args:
        axis: that dim, as the small operators name it.
        weight_first: transformers' own module (weight * x, the weight in the model's dtype) where diffusers
            uses torch's (x * weight, both in float32).
    """
    if g.opset >= 23:
        weight = norm_weight(g, name, width)
        return g.op("RMSNormalization", x, weight, axis=-1, epsilon=np.float32(epsilon), stash_type=1)
    wide = g.up(x)
    square = g.op("Pow", wide, g.constant(2.0, "float32"))
    mean = g.op("ReduceMean", square, [axis], keepdims=1, noop_with_empty_axes=0)
    root = g.op("Sqrt", g.op("Add", mean, g.constant(epsilon, "float32")))
    normal = g.op("Mul", wide, g.op("Reciprocal", root))
    if weight_first:
        return g.op("Mul", norm_weight(g, name, width), g.down(normal))
    return g.down(g.op("Mul", normal, norm_weight(g, name, width, "float32")))


# --- attention ---


@dataclass(frozen=True)
class Heads:
    """The sizes of one attention."""

    batch: Dim
    heads: int
    queries: Dim
    keys: Dim
    width: int

    @property
    def static(self) -> bool:
        return not any(isinstance(d, str) for d in (self.batch, self.queries, self.keys))


def attention(
    g: GraphBuilder,
    q: str,
    k: str,
    v: str,
    sizes: Heads,
    *,
    mask: str = "",
    causal: bool = False,
    with_scale: bool = False,
) -> str:
    """Scaled dot product attention over [batch, heads, tokens, width].

    Args:
        mask: a boolean tensor that is true where a query sees a key, or nothing.
        causal: whether a query sees the keys up to its own place only; without a mask.
        with_scale: whether the module passes the scale, which then stands in the graph.
    """
    scale = sizes.width**-0.5
    if g.opset >= 23:
        given = {"scale": scale} if with_scale else {}
        masks = [mask] if mask else []
        return g.op("Attention", q, k, v, *masks, is_causal=int(causal), qk_matmul_output_mode=0, softcap=0.0, **given)
    root = g.constant(scale**0.5 if with_scale else [scale**0.5])
    scores = g.op("MatMul", g.op("Mul", q, root), g.op("Mul", transposed_keys(g, k, sizes), root))
    if mask:
        scores = g.op("Add", scores, g.once("Where", mask, 0.0, lowest(g.dtype)))
    elif causal:
        ones = g.once("Expand", 1.0, g.shape(sizes.queries, sizes.keys))
        below = g.once("Equal", g.once("Trilu", ones, upper=0), 0.0)
        scores = g.op("Add", scores, g.once("Where", below, float("-inf"), 0.0))
    weights = g.op("Softmax", scores, axis=-1)
    if mask:
        weights = g.op("Where", g.op("IsNaN", weights), 0.0, weights)
    return g.op("MatMul", weights, v)


def transposed_keys(g: GraphBuilder, k: str, sizes: Heads) -> str:
    """The keys as [batch, heads, width, tokens], by way of three dims as the exporter has it."""
    if sizes.static:
        flat = g.reshape(k, -1, sizes.keys, sizes.width, allowzero=0)
        turned = g.transpose(flat, 0, 2, 1)
        return g.reshape(turned, sizes.batch, sizes.heads, sizes.width, sizes.keys, allowzero=0)
    shape = g.op("Shape", k, start=0)
    width = g.op("Slice", shape, [-1], [LAST])
    tokens = g.op("Slice", shape, [-2], [-1])
    outer = g.op("Slice", shape, [-(2**63)], [-2])
    flat = g.op("Reshape", k, g.op("Concat", [-1], tokens, width, axis=0), allowzero=0)
    turned = g.transpose(flat, 0, 2, 1)
    return g.op("Reshape", turned, g.op("Concat", outer, width, tokens, axis=0), allowzero=0)


def split_heads(g: GraphBuilder, x: str, batch: Dim, tokens: Dim, width: int, heads: int = -1) -> str:
    """[batch, tokens, heads * width] to [batch, heads, tokens, width]."""
    return g.transpose(g.reshape(x, batch, tokens, heads, width), 0, 2, 1, 3)


def merge_heads(g: GraphBuilder, x: str, batch: Dim, tokens: Dim, width: int = -1) -> str:
    return g.reshape(g.transpose(x, 0, 2, 1, 3), batch, tokens, width)


def visible(g: GraphBuilder, keep: str, batch: Dim, tokens: Dim, causal: bool) -> str:
    """The mask [batch, 1, tokens, tokens] of the transformers library, from the padding mask of the keys.

    It looks the padding up by (batch, key) pairs; with sizes given, the pairs are constants.
    """
    flags = g.cast(keep, "bool")
    if isinstance(batch, int) and isinstance(tokens, int):
        places = np.arange(tokens)
        rows = g.constant(places.reshape(1, 1, tokens, 1), "int64")
        columns = g.constant(places.reshape(1, 1, 1, tokens), "int64")
        pairs = np.stack(np.meshgrid(np.arange(batch), places, indexing="ij"), axis=-1)
        index = g.constant(pairs.reshape(batch, 1, 1, tokens, 2), "int64")
    else:
        samples = g.unsqueeze(g.unsqueeze(g.arange(batch), 1, 2), 3)
        places_row = g.unsqueeze(g.arange(tokens), 0, 1)
        rows, columns = g.unsqueeze(places_row, 3), g.unsqueeze(places_row, 2)
        shape = g.op("Shape", g.op("Max", samples, columns), start=0)
        pair = [g.unsqueeze(g.op("Expand", part, shape), -1) for part in (samples, columns)]
        index = g.op("Concat", *pair, axis=-1)
    seen = g.op("LessOrEqual", columns, rows) if causal else g.op("GreaterOrEqual", rows, 0)
    padding = g.op("GatherND", flags, index, batch_dims=0)
    return g.op("And", g.op("And", True, seen), padding)


# --- diffusion transformers ---


def timestep_embedding(g: GraphBuilder, t: str, name: str, width: int, hidden: int, wide: bool) -> str:
    """Sines and cosines of a time, then two linear layers.

    Args:
        wide: whether the time has the model's dtype, and is cast to float32 only if that is another one.
    """
    half = width // 2
    column = g.unsqueeze(t, 1)
    column = g.up(column) if wide else g.cast(column, "float32")
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half)[None]
    angles = g.op("Mul", column, g.constant(frequencies, "float32"))
    both = g.op("Concat", g.op("Sin", angles), g.op("Cos", angles), axis=-1)
    flipped = g.op("Concat", g.slice(both, 1, half), g.slice(both, 1, 0, half), axis=-1)
    return two_layers(g, g.down(flipped), name, width, hidden)


def two_layers(g: GraphBuilder, x: str, name: str, inputs: int, hidden: int) -> str:
    first = gemm(g, x, f"{name}.linear_1", inputs, hidden)
    return gemm(g, silu(g, first), f"{name}.linear_2", hidden, hidden)
