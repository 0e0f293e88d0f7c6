"""Export transformers' LlamaForCausalLM with the layers of Llama-3-70B to ONNX, without its weights.

python benchmarks/gpu/export_llama.py FOLDER

Needs torch, transformers and onnxscript, and neither a GPU nor the memory that the weights would take.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from exporting import export
from llama import last_logits
from shapes import LLAMA, WORKS, onnx_path


def main(folder: Path) -> None:
    """Write a file for every length. The parameters take no memory, since nobody writes to them."""
    model = last_logits(LLAMA, "cpu")
    for work in WORKS:
        if work.model == "llama":
            path = onnx_path(folder, work)
            export(model, {"input_ids": torch.zeros(1, work.tokens, dtype=torch.int64)}, "logits", path)
            print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
