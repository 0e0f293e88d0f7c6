"""What is measured: the two models, their sizes, and the marks set for them. Imports nothing but the standard library.

Both sides of a comparison read this file, so that they run the same work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
"""diffusers' FluxTransformer2DModel as FLUX.1-dev has it, with fewer blocks."""

LLAMA: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
"""transformers' LlamaForCausalLM with the layers of Llama-3-70B, four of them.

Logits are of the last token alone, as when a prompt is read before generating.
"""

TEXT = 512
"""Text tokens of every FLUX run; the rest are image tokens."""


@dataclass(frozen=True, eq=False)
class Work:
    """One thing that is measured.

    Attributes:
        name: of the work, and of its ONNX file.
        model: `flux` or `llama`.
        tokens: of one run, in all.
        ranks: GPU counts, the most important first.
        marks: GPU count -> the ratio to the peer's best that is asked for.
        speedup: GPU count -> the least ratio of one GPU's time to it that is asked for.
    """

    name: str
    model: str
    tokens: int
    ranks: tuple[int, ...]
    marks: dict[int, float]
    speedup: dict[int, float]

    @property
    def image(self) -> int:
        """Image tokens of a FLUX run."""
        return self.tokens - TEXT

    @property
    def side(self) -> int:
        """Tokens along one side of the square image."""
        side = int(self.image**0.5)
        assert side * side == self.image
        return side


WORKS: tuple[Work, ...] = (
    Work("flux-4608", "flux", 4608, (1, 4, 2, 8), {1: 0.80, 4: 0.40, 8: 0.20}, {}),
    Work("flux-16896", "flux", 16896, (1, 4, 2, 8), {1: 0.87, 8: 0.65}, {}),
    Work("flux-66048", "flux", 66048, (1, 4, 2, 8), {1: 0.90, 4: 0.85}, {8: 7.2}),
    Work("llama-4096", "llama", 4096, (1, 4, 2, 8), {8: 0.75}, {}),
    Work("llama-1", "llama", 1, (1, 4, 2, 8), {8: 0.35}, {}),
)

BY_NAME: dict[str, Work] = {work.name: work for work in WORKS}

PEAK_FLOPS = 794e12
"""bf16 FLOP/s of a large square product on one H200, measured."""

PEAK_ATTENTION = 666e12
"""bf16 FLOP/s of cuDNN's attention on one H200, measured at 16896 tokens."""

PEAK_BYTES = 4.3e12
"""Bytes a second, read and written, of a copy within one H200, measured."""


def selected(only: str | None) -> list[Work]:
    """The works whose names begin with one of the comma-separated words; all of them if there are none."""
    words = [word.strip() for word in (only or "").split(",") if word.strip()]
    found = [work for work in WORKS if not words or any(work.name.startswith(word) for word in words)]
    if not found:
        raise SystemExit(f"error: {only!r} selects nothing; there are {', '.join(BY_NAME)}")
    return found


def flops(work: Work) -> tuple[float, float]:
    """FLOPs of one run: (of linear layers, of attention). Causal attention counts the half that is needed."""
    if work.model == "llama":
        return _llama_flops(work.tokens)
    hidden = FLUX["attention_head_dim"] * FLUX["num_attention_heads"]
    blocks = FLUX["num_layers"] + FLUX["num_single_layers"]
    linear = 2 * work.tokens * 12 * hidden**2 * blocks
    ends = 2 * hidden * (work.image * 2 * FLUX["in_channels"] + TEXT * FLUX["joint_attention_dim"])
    return float(linear + ends), float(4 * work.tokens**2 * hidden * blocks)


def weight_bytes(work: Work) -> float:
    """Bytes of the linear layers' weights in bf16, which every run reads at least once."""
    if work.model == "llama":
        return 2.0 * _llama_weights()
    hidden = FLUX["attention_head_dim"] * FLUX["num_attention_heads"]
    double = FLUX["num_layers"] * 2 * (12 + 6) * hidden**2
    single = FLUX["num_single_layers"] * (12 + 3) * hidden**2
    return 2.0 * (double + single)


def floor_ms(work: Work, ranks: int) -> float:
    """The least time of one run, with nothing sent and everything divided: arithmetic or memory, whichever is longer.

    Products at `PEAK_FLOPS`, attention at `PEAK_ATTENTION`; or the weights at `PEAK_BYTES`.
    """
    linear, attention = flops(work)
    arithmetic = linear / PEAK_FLOPS + attention / PEAK_ATTENTION
    return 1000.0 * max(arithmetic, weight_bytes(work) / PEAK_BYTES) / ranks


def _llama_weights() -> float:
    hidden, width = LLAMA["hidden_size"], LLAMA["head_dim"]
    heads, groups = LLAMA["num_attention_heads"], LLAMA["num_key_value_heads"]
    layer = hidden * width * (2 * heads + 2 * groups) + 3 * hidden * LLAMA["intermediate_size"]
    return float(LLAMA["num_hidden_layers"] * layer + hidden * LLAMA["vocab_size"])


def _llama_flops(tokens: int) -> tuple[float, float]:
    head = LLAMA["hidden_size"] * LLAMA["vocab_size"]
    width = LLAMA["head_dim"] * LLAMA["num_attention_heads"]
    attention = 4 * (tokens * (tokens + 1) / 2) * width * LLAMA["num_hidden_layers"]
    return 2.0 * (tokens * (_llama_weights() - head) + head), attention


def onnx_path(folder: Path, work: Work) -> Path:
    """Where the exported graph of `work` is."""
    return folder / f"{work.name}.onnx"
