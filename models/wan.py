"""Wan: a video diffusion transformer with self-attention over patches and cross-attention to text."""

from __future__ import annotations

import numpy as np
import onnx

from onnxmesh.models.builder import LAST, GraphBuilder
from onnxmesh.models.layers import (
    Heads,
    attention,
    gelu_tanh,
    gemm,
    layer_norm,
    linear_bias,
    merge_heads,
    plain_layer_norm,
    rms_norm,
    silu,
    split_heads,
    timestep_embedding,
)
from onnxmesh.models.weights import Weights

EPSILON = 1e-6
PATCH = (1, 2, 2)
FOLDED = 2**16
"""Elements up to which the exporter writes a constant in place of the nodes that make it."""


def wan(
    *,
    layers: int,
    heads: int,
    head_dim: int,
    intermediate: int,
    frames: int,
    height: int,
    width: int,
    text: int,
    text_width: int,
    channels: int = 16,
    time_width: int = 256,
    positions: int = 1024,
    batch: int = 1,
    dtype: str = "float32",
    opset: int = 23,
    weights: Weights | None = None,
) -> onnx.ModelProto:
    """One denoising step of diffusers' WanTransformer3DModel, from text to video.

    Args:
        frames: the size of the latent video, as are height and width; a token is a patch of 1 x 2 x 2.
        positions: the length of the stored rotary tables.
    """
    g = GraphBuilder("wan", dtype=dtype, opset=opset, weights=weights)
    grid = (frames // PATCH[0], height // PATCH[1], width // PATCH[2])
    block = WanBlocks(g, batch, heads, head_dim, grid, text, intermediate)
    hidden, tokens = block.hidden, block.tokens
    video = g.input("hidden_states", dtype, batch, channels, frames, height, width)
    timestep = g.input("timestep", "int64", batch)
    words = g.input("encoder_hidden_states", dtype, batch, text, text_width)

    block.rotary_tables(positions)
    x = patches(g, video, channels, hidden)
    x = g.transpose(g.reshape(x, batch, hidden, tokens), 0, 2, 1)
    name = "condition_embedder"
    time = timestep_embedding(g, timestep, f"{name}.time_embedder", time_width, hidden, wide=False)
    modulation = gemm(g, silu(g, time), f"{name}.time_proj", hidden, 6 * hidden)
    words = linear_bias(g, words, f"{name}.text_embedder.linear_1", text_width, hidden)
    words = linear_bias(g, gelu_tanh(g, words), f"{name}.text_embedder.linear_2", hidden, hidden)
    modulation = g.up(g.reshape(modulation, batch, 6, hidden))
    for layer in range(layers):
        x = block.write(f"blocks.{layer}", x, words, modulation)

    table = g.weight("scale_shift_table", 1, 2, hidden, std=hidden**-0.5)
    shift, scale = g.split(g.op("Add", table, g.unsqueeze(time, 1)), 1, 2)
    normal = plain_layer_norm(g, g.up(x), hidden, EPSILON, "float32")
    normal = g.op("Mul", normal, g.up(g.op("Add", scale, 1.0)))
    x = g.down(g.op("Add", normal, g.up(shift)))
    x = linear_bias(g, x, "proj_out", hidden, channels * int(np.prod(PATCH)))
    x = g.transpose(g.reshape(x, batch, *grid, *PATCH, -1), 0, 7, 1, 4, 2, 5, 3, 6)
    g.op("Reshape", x, g.shape(batch, channels, frames, height, width), out="sample")
    g.output("sample", batch, channels, frames, height, width)
    return g.proto


def patches(g: GraphBuilder, video: str, channels: int, hidden: int) -> str:
    """A convolution whose kernel is its stride."""
    fan = channels * int(np.prod(PATCH))
    kernel = g.weight("patch_embedding.weight", hidden, channels, *PATCH, std=fan**-0.5)
    bias = g.weight("patch_embedding.bias", hidden, std=0.2)
    return g.op(
        "Conv",
        video,
        kernel,
        bias,
        auto_pad="NOTSET",
        dilations=[1, 1, 1],
        group=1,
        kernel_shape=PATCH,
        pads=[0] * 6,
        strides=PATCH,
    )


class WanBlocks:
    """Writes the blocks of one model into its graph."""

    def __init__(
        self,
        g: GraphBuilder,
        batch: int,
        heads: int,
        width: int,
        grid: tuple[int, int, int],
        text: int,
        intermediate: int,
    ) -> None:
        self.g, self.batch, self.heads, self.width, self.grid = g, batch, heads, width, grid
        self.text, self.intermediate = text, intermediate
        self.hidden, self.tokens = heads * width, grid[0] * grid[1] * grid[2]
        self.cosine = self.sine = ""

    def rotary_tables(self, positions: int) -> None:
        """Tables of every token, out of stored ones for time, height and width, each column twice."""
        side = 2 * (self.width // 6)
        parts = (self.width - 2 * side, side, side)
        rates = [10000.0 ** -(np.arange(0, part, 2) / part) for part in parts]
        angles = np.outer(np.arange(positions), np.repeat(np.concatenate(rates), 2))
        self.cosine = self.rotary_table(np.cos(angles), parts)
        self.sine = self.rotary_table(np.sin(angles), parts)

    def rotary_table(self, table: np.ndarray, parts: tuple[int, int, int]) -> str:
        g, columns = self.g, []
        for axis, part in enumerate(g.split_sizes(g.constant(table), 1, *parts)):
            size = self.grid[axis]
            rows = g.op("Slice", part, [0], [size], [0], [1])
            rows = g.reshape(rows, *(size if i == axis else 1 for i in range(3)), -1)
            columns.append(g.op("Expand", rows, g.shape(*self.grid, 1)))
        return g.reshape(g.op("Concat", *columns, axis=-1), 1, self.tokens, 1, -1)

    def rotate(self, x: str) -> str:
        """Turn [batch, tokens, hidden]; the result is [width, tokens, heads, batch].

        The module writes the even and the odd places of an empty tensor, which the exporter puts into
        ScatterND over the last dim brought to the front.
        """
        g, dims = self.g, (self.batch, self.tokens, self.heads)
        pairs = g.op("Reshape", x, g.shape(*dims, self.width // 2, 2))
        first, second = [g.op("Squeeze", g.op("Slice", pairs, [i], [i + 1], [-1]), [-1]) for i in (0, 1)]
        cosine = g.once("Slice", self.cosine, [0], [LAST], [3], [2])
        sine = g.once("Slice", self.sine, [1], [LAST], [3], [2])
        even = g.op("Sub", g.op("Mul", first, cosine), g.op("Mul", second, sine))
        odd = g.op("Add", g.op("Mul", first, sine), g.op("Mul", second, cosine))
        turned = self.scatter(self.empty(), 0, even)
        return self.scatter(g.op("Identity", turned), 1, odd)

    def scatter(self, onto: str, start: int, values: str) -> str:
        g = self.g
        places = g.constant(np.arange(start, self.width, 2)[:, None], "int64")
        return g.op("ScatterND", onto, places, g.transpose(values, 3, 1, 2, 0), reduction="none")

    def empty(self) -> str:
        """Zeros in the shape of the turned heads with the last dim first."""
        g, dims = self.g, (self.batch, self.tokens, self.heads, self.width)
        if np.prod(dims) <= FOLDED:
            return g.constant(np.zeros(dims).transpose(3, 1, 2, 0))
        return g.once("Transpose", g.once("Expand", 0.0, g.shape(*dims)), perm=(3, 1, 2, 0))

    def self_attention(self, x: str, name: str) -> str:
        g = self.g
        q, k, v = [self.project(x, f"{name}.to_{part}") for part in "qkv"]
        q, k = [
            g.transpose(self.rotate(self.norm(value, f"{name}.norm_{part}")), 3, 2, 1, 0)
            for part, value in (("q", q), ("k", k))
        ]
        v = split_heads(g, v, self.batch, self.tokens, self.width, self.heads)
        return self.attend(name, q, k, v, self.tokens)

    def cross_attention(self, x: str, words: str, name: str) -> str:
        g, batch = self.g, self.batch
        q = self.norm(self.project(x, f"{name}.to_q"), f"{name}.norm_q")
        k = self.norm(self.project(words, f"{name}.to_k"), f"{name}.norm_k")
        v = self.project(words, f"{name}.to_v")
        q = split_heads(g, q, batch, self.tokens, self.width, self.heads)
        k, v = [split_heads(g, part, batch, self.text, self.width, self.heads) for part in (k, v)]
        return self.attend(name, q, k, v, self.text)

    def project(self, x: str, name: str) -> str:
        return linear_bias(self.g, x, name, self.hidden, self.hidden)

    def norm(self, x: str, name: str) -> str:
        """RMSNorm over the width of all heads together."""
        return rms_norm(self.g, x, name, self.hidden, EPSILON, axis=2)

    def attend(self, name: str, q: str, k: str, v: str, keys: int) -> str:
        g = self.g
        mixed = attention(g, q, k, v, Heads(self.batch, self.heads, self.tokens, keys, self.width))
        merged = merge_heads(g, mixed, self.batch, self.tokens, self.hidden)
        return self.project(merged, f"{name}.to_out.0")

    def modulate(self, x: str, shift: str, scale: str) -> str:
        """Norm, scale and shift of a float32 value."""
        g = self.g
        grown = g.op("Add", scale, g.constant(1.0, "float32"))
        normal = g.op("Mul", plain_layer_norm(g, x, self.hidden, EPSILON, "float32"), grown)
        return g.down(g.op("Add", normal, shift))

    def gated(self, x: str, gate: str, change: str) -> str:
        g = self.g
        return g.down(g.op("Add", x, g.op("Mul", g.up(change), gate)))

    def write(self, name: str, x: str, words: str, modulation: str) -> str:
        """One block; what is modulated is computed in float32."""
        g, hidden, inner = self.g, self.hidden, self.intermediate
        table = g.weight(f"{name}.scale_shift_table", 1, 6, hidden, std=hidden**-0.5, dtype="float32")
        parts = g.split(g.op("Add", table, modulation), 1, 6)
        wide = g.up(x)
        mixed = self.self_attention(self.modulate(wide, *parts[:2]), f"{name}.attn1")
        x = self.gated(wide, parts[2], mixed)
        normal = g.down(layer_norm(g, g.up(x), f"{name}.norm2", hidden, EPSILON, "float32"))
        x = g.op("Add", x, self.cross_attention(normal, words, f"{name}.attn2"))
        wide = g.up(x)
        change = self.modulate(wide, *parts[3:5])
        change = gelu_tanh(g, linear_bias(g, change, f"{name}.ffn.net.0.proj", hidden, inner))
        return self.gated(wide, parts[5], linear_bias(g, change, f"{name}.ffn.net.2", inner, hidden))
