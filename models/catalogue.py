"""Models by name at their real sizes, and how to write one to disk.

python -m onnxmesh.models.catalogue llama-70b llama.onnx --layers 2 --weights none
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxmesh.models.bert import bert
from onnxmesh.models.flux import flux
from onnxmesh.models.gpt2 import gpt2
from onnxmesh.models.llama import llama
from onnxmesh.models.wan import wan
from onnxmesh.models.weights import InlineWeights, SparseWeights, StreamedWeights, Weights


@dataclass(frozen=True)
class Entry:
    """A builder with its settings.

    Attributes:
        layers: the settings that count repeated blocks; `layers=` sets all of them.
    """

    builder: Callable[..., onnx.ModelProto]
    settings: Mapping[str, Any]
    layers: tuple[str, ...] = ("layers",)

    def build(self, layers: int | None = None, weights: Weights | None = None, **changes: Any) -> onnx.ModelProto:
        """The model, with as many blocks of each kind as asked for, and any setting changed."""
        counts = {} if layers is None else dict.fromkeys(self.layers, layers)
        return self.builder(**{**self.settings, **counts, **changes}, weights=weights)


def _llama(**sizes: Any) -> Entry:
    common = {"dtype": "bfloat16", "batch": 1, "seq": 4096, "kv_heads": 8, "rope_theta": 500000.0}
    return Entry(llama, common | {"epsilon": 1e-5} | sizes)


CATALOGUE: dict[str, Entry] = {
    # Small, with dims that divide by 4 on either axis; in float32, so that ONNX Runtime runs it.
    "demo": _llama(
        layers=2, hidden=64, heads=8, kv_heads=4, intermediate=128, vocab=128, batch=2, seq=16, dtype="float32"
    ),
    "llama-8b": _llama(layers=32, hidden=4096, heads=32, intermediate=14336, vocab=128256),
    "llama-70b": _llama(layers=80, hidden=8192, heads=64, intermediate=28672, vocab=128256),
    # Llama-8B's width, with layers and vocabulary such that the weights are 8 GiB, and in a dtype that
    # ONNX Runtime has.
    "eight-gib": _llama(
        layers=18, hidden=4096, heads=32, intermediate=14336, vocab=45056, seq=2048, dtype="float16"
    ),
    "bert-large": Entry(
        bert,
        {
            "layers": 24, "hidden": 1024, "heads": 16, "intermediate": 4096, "vocab": 30522,
            "batch": 8, "seq": 512, "dtype": "float16",
        },
    ),
    "gpt2-xl": Entry(
        gpt2,
        {
            "layers": 48, "hidden": 1600, "heads": 25, "vocab": 50257,
            "batch": 4, "seq": 1024, "dtype": "float16",
        },
    ),
    "flux": Entry(
        flux,
        {
            "double": 19, "single": 38, "heads": 24, "head_dim": 128, "text": 512, "image": 4096,
            "channels": 64, "text_width": 4096, "pooled_width": 768, "axes": (16, 56, 56),
            "batch": 1, "dtype": "bfloat16",
        },
        layers=("double", "single"),
    ),
    "wan-14b": Entry(
        wan,
        {
            "layers": 40, "heads": 40, "head_dim": 128, "intermediate": 13824, "text": 512, "text_width": 4096,
            "frames": 8, "height": 64, "width": 64, "batch": 1, "dtype": "bfloat16",
        },
    ),
}  # fmt: skip

WEIGHTS = ("random", "none", "streamed")


def build(name: str, layers: int | None = None, weights: Weights | None = None, **changes: Any) -> onnx.ModelProto:
    """A model of the catalogue in memory; its weights random and inside it unless given otherwise."""
    return CATALOGUE[name].build(layers, weights, **changes)


def save(
    name: str,
    path: str | Path,
    layers: int | None = None,
    weights: str = "random",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a model of the catalogue to a file.

    Args:
        layers: the number of blocks of each kind; the real one if None.
        weights: "random" keeps them inside the file, which is for small models; "none" writes an external
            file of zeros that takes no disk; "streamed" writes random ones to an external file.
        changes: settings of the builder, like batch, seq, dtype and opset. A dim given as a string stays open.
    """
    path = Path(path)
    location = f"{path.name}.data"
    makers: dict[str, Callable[[], Weights]] = {
        "random": lambda: InlineWeights(seed),
        "none": lambda: SparseWeights(location),
        "streamed": lambda: StreamedWeights(location, seed=seed),
    }
    store = makers[weights]()
    onnx.save(build(name, layers, store, **changes), path)
    store.write(path.parent)
    return path
