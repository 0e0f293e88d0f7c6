"""Export a FLUX-size transformer of diffusers to ONNX, without its weights.

python benchmarks/gpu/export_flux.py FOLDER

Needs torch, diffusers and onnxscript, and neither a GPU nor the memory that the weights would take.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from exporting import export
from shapes import FLUX, TEXT, WORKS, Work, onnx_path


def inputs(work: Work, batch: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of the right sizes, by name."""
    sizes = {
        "hidden_states": (batch, work.image, FLUX["in_channels"]),
        "encoder_hidden_states": (batch, TEXT, FLUX["joint_attention_dim"]),
        "pooled_projections": (batch, FLUX["pooled_projection_dim"]),
        "timestep": (batch,),
        "img_ids": (work.image, 3),
        "txt_ids": (TEXT, 3),
        "guidance": (batch,),
    }
    return {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes.items()}


def main(folder: Path) -> None:
    """Write a file for every length. The parameters take no memory, since nobody writes to them."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FLUX)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for work in WORKS:
        if work.model == "flux":
            path = onnx_path(folder, work)
            export(model, {**inputs(work), "return_dict": False}, "sample", path)
            print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
