"""FLUX: a diffusion transformer over text and image tokens, in double and then single stream blocks."""

from __future__ import annotations

import numpy as np
import onnx

from onnxmesh.models.builder import GraphBuilder
from onnxmesh.models.layers import (
    Heads,
    attention,
    gelu_tanh,
    gemm,
    linear_bias,
    merge_heads,
    plain_layer_norm,
    rms_norm,
    silu,
    timestep_embedding,
    two_layers,
)
from onnxmesh.models.weights import Weights

EPSILON = 1e-6
TIME_WIDTH = 256


def flux(
    *,
    double: int,
    single: int,
    heads: int,
    head_dim: int,
    text: int,
    image: int,
    channels: int,
    text_width: int,
    pooled_width: int,
    axes: tuple[int, ...],
    batch: int = 1,
    dtype: str = "float32",
    opset: int = 23,
    weights: Weights | None = None,
) -> onnx.ModelProto:
    """One denoising step of diffusers' FluxTransformer2DModel with guidance.

    Args:
        double: the number of blocks in which text and image have weights of their own.
        single: the number of blocks after them, over both in one sequence.
        axes: how many of a head's dims turn with each coordinate of a token's id.
    """
    g = GraphBuilder("flux", dtype=dtype, opset=opset, weights=weights)
    block = FluxBlocks(g, batch, heads, head_dim, text, image)
    hidden = block.hidden
    latents = g.input("hidden_states", dtype, batch, image, channels)
    words = g.input("encoder_hidden_states", dtype, batch, text, text_width)
    pooled = g.input("pooled_projections", dtype, batch, pooled_width)
    timestep = g.input("timestep", dtype, batch)
    image_ids = g.input("img_ids", dtype, image, len(axes))
    text_ids = g.input("txt_ids", dtype, text, len(axes))
    guidance = g.input("guidance", dtype, batch)

    x = linear_bias(g, latents, "x_embedder", channels, hidden)
    time, guide = [
        timestep_embedding(
            g, g.op("Mul", value, 1000.0), f"time_text_embed.{name}_embedder", TIME_WIDTH, hidden, wide=True
        )
        for value, name in ((timestep, "timestep"), (guidance, "guidance"))
    ]
    pooled = two_layers(g, pooled, "time_text_embed.text_embedder", pooled_width, hidden)
    condition = silu(g, g.op("Add", g.op("Add", time, guide), pooled))
    words = linear_bias(g, words, "context_embedder", text_width, hidden)
    block.rotary_tables(g.up(g.op("Concat", text_ids, image_ids, axis=0)), axes)

    for layer in range(double):
        x, words = block.double(f"transformer_blocks.{layer}", x, words, condition)
    both = g.op("Concat", words, x, axis=1)
    for layer in range(single):
        if layer:
            both = g.op("Concat", g.slice(both, 1, 0, text), g.slice(both, 1, text), axis=1)
        both = block.single(f"single_transformer_blocks.{layer}", both, condition)
    x = g.slice(both, 1, text)

    scale, shift = g.split(gemm(g, condition, "norm_out.linear", hidden, 2 * hidden), 1, 2)
    grown = g.unsqueeze(g.op("Add", scale, 1.0), 1)
    x = g.op("Mul", plain_layer_norm(g, x, hidden, EPSILON), grown)
    x = g.op("Add", x, g.unsqueeze(shift, 1))
    linear_bias(g, x, "proj_out", hidden, channels, out="sample")
    g.output("sample", batch, image, channels)
    return g.proto


class FluxBlocks:
    """Writes the blocks of one model into its graph."""

    def __init__(self, g: GraphBuilder, batch: int, heads: int, width: int, text: int, image: int) -> None:
        self.g, self.batch, self.heads, self.width = g, batch, heads, width
        self.text, self.image, self.tokens = text, image, text + image
        self.hidden = heads * width
        self.cosine = self.sine = ""

    def rotary_tables(self, ids: str, axes: tuple[int, ...]) -> None:
        """Cosines and sines of every token, each twice, from the ids' coordinates; in float64."""
        g, parts = self.g, []
        for axis, width in enumerate(axes):
            column = g.reshape(g.op("Gather", ids, axis, axis=1), self.tokens, 1)
            frequencies = 10000.0 ** -(np.arange(0, width, 2) / width)
            angles = g.op("Mul", g.cast(column, "float64"), g.constant(frequencies, "float64"))
            parts.append([self.twice(g.op(function, angles)) for function in ("Cos", "Sin")])
        cosines, sines = zip(*parts)
        self.cosine = g.unsqueeze(g.op("Concat", *cosines, axis=-1), 0, 2)
        self.sine = g.unsqueeze(g.op("Concat", *sines, axis=-1), 0, 2)

    def twice(self, table: str) -> str:
        """Every column twice, side by side."""
        g = self.g
        pairs = g.op("Expand", g.unsqueeze(table, 2), [1, 1, 2])
        return g.cast(g.reshape(pairs, self.tokens, -1, allowzero=0), "float32")

    def rotate(self, x: str) -> str:
        """Turn [batch, tokens, heads, width], whose pairs lie side by side."""
        g, dims = self.g, (self.batch, self.tokens, self.heads)
        pairs = g.reshape(x, *dims, -1, 2)
        first, second = [g.op("Squeeze", g.op("Slice", pairs, [i], [i + 1], [-1]), [-1]) for i in (0, 1)]
        crossed = g.unsqueeze(g.op("Neg", second), -1)
        crossed = g.op("Concat", crossed, g.unsqueeze(first, -1), axis=-1)
        crossed = g.reshape(crossed, *dims, self.width)
        straight = g.op("Mul", g.up(x), self.cosine)
        return g.down(g.op("Add", straight, g.op("Mul", g.up(crossed), self.sine)))

    def heads_of(self, x: str, name: str, projections: str, norms: str, tokens: int) -> list[str]:
        """Queries, keys and values as [batch, tokens, heads, width], the first two normalised per head."""
        g = self.g
        q, k, v = [
            g.reshape(
                linear_bias(g, x, f"{name}.{projections.format(part)}", self.hidden, self.hidden),
                *(self.batch, tokens, self.heads, self.width),
            )
            for part in "qkv"
        ]
        q, k = [
            rms_norm(g, value, f"{name}.{norms.format(part)}", self.width, EPSILON, axis=3)
            for part, value in (("q", q), ("k", k))
        ]
        return [q, k, v]

    def attend(self, q: str, k: str, v: str) -> str:
        g = self.g
        q, k, v = [g.transpose(part, 0, 2, 1, 3) for part in (self.rotate(q), self.rotate(k), v)]
        sizes = Heads(self.batch, self.heads, self.tokens, self.tokens, self.width)
        return merge_heads(g, attention(g, q, k, v, sizes), self.batch, self.tokens, self.hidden)

    def modulate(self, x: str, shift: str, scale: str) -> str:
        g = self.g
        grown = g.op("Add", g.unsqueeze(scale, 1), 1.0)
        normal = g.op("Mul", plain_layer_norm(g, x, self.hidden, EPSILON), grown)
        return g.op("Add", normal, g.unsqueeze(shift, 1))

    def gated(self, x: str, gate: str, change: str) -> str:
        g = self.g
        return g.op("Add", x, g.op("Mul", g.unsqueeze(gate, 1), change))

    def clipped(self, x: str) -> str:
        """In float16 the library keeps a block's result finite."""
        g = self.g
        return g.op("Clip", x, -65504.0, 65504.0) if g.dtype == "float16" else x

    def modulation(self, name: str, condition: str, parts: int) -> list[str]:
        hidden = self.hidden
        return self.g.split(gemm(self.g, condition, f"{name}.linear", hidden, parts * hidden), 1, parts)

    def feed_forward(self, x: str, name: str) -> str:
        g, hidden = self.g, self.hidden
        inner = gelu_tanh(g, linear_bias(g, x, f"{name}.net.0.proj", hidden, 4 * hidden))
        return linear_bias(g, inner, f"{name}.net.2", 4 * hidden, hidden)

    def double(self, name: str, x: str, words: str, condition: str) -> tuple[str, str]:
        """A block of two streams that meet in attention alone."""
        g, hidden = self.g, self.hidden
        image = self.modulation(f"{name}.norm1", condition, 6)
        text = self.modulation(f"{name}.norm1_context", condition, 6)
        attn = f"{name}.attn"
        seen = self.heads_of(self.modulate(x, *image[:2]), attn, "to_{}", "norm_{}", self.image)
        read = self.heads_of(self.modulate(words, *text[:2]), attn, "add_{}_proj", "norm_added_{}", self.text)
        mixed = self.attend(*(g.op("Concat", *pair, axis=1) for pair in zip(read, seen)))
        text_part, image_part = g.split_sizes(mixed, 1, self.text, self.image)
        seen_change = linear_bias(g, image_part, f"{attn}.to_out.0", hidden, hidden)
        read_change = linear_bias(g, text_part, f"{attn}.to_add_out", hidden, hidden)
        x = self.gated(x, image[2], seen_change)
        x = self.gated(x, image[5], self.feed_forward(self.modulate(x, *image[3:5]), f"{name}.ff"))
        words = self.gated(words, text[2], read_change)
        inner = self.feed_forward(self.modulate(words, *text[3:5]), f"{name}.ff_context")
        return x, self.clipped(self.gated(words, text[5], inner))

    def single(self, name: str, x: str, condition: str) -> str:
        """A block of one stream, with attention and feed-forward side by side into one linear layer."""
        g, hidden = self.g, self.hidden
        shift, scale, gate = self.modulation(f"{name}.norm", condition, 3)
        normal = self.modulate(x, shift, scale)
        inner = gelu_tanh(g, linear_bias(g, normal, f"{name}.proj_mlp", hidden, 4 * hidden))
        mixed = self.attend(*self.heads_of(normal, f"{name}.attn", "to_{}", "norm_{}", self.tokens))
        both = g.op("Concat", mixed, inner, axis=2)
        change = linear_bias(g, both, f"{name}.proj_out", 5 * hidden, hidden)
        return self.clipped(self.gated(x, gate, change))
