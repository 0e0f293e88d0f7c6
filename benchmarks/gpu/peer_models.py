"""The peers: the same models in torch, as their own libraries run them on many GPUs.

diffusers: blocks compiled one by one (`compile_repeated_blocks`), cuDNN attention, Ulysses and Ring by its
ContextParallelConfig. transformers: DTensor in Megatron's pattern, the whole model compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from shapes import FLUX, LLAMA, TEXT, Work

Step = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """How large the models are: as measured, or tiny for a trial on a host.

    Attributes:
        flux, llama: the settings of each.
        shrink: what lengths are divided by.
    """

    flux: Mapping[str, Any]
    llama: Mapping[str, Any]
    shrink: int = 1

    @classmethod
    def tiny(cls) -> Sizes:
        """Two blocks of each kind that a host runs in a moment."""
        flux = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4}
        flux |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
        llama = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
        llama |= {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 256}
        return cls({**FLUX, **flux}, {**LLAMA, **llama}, 64)

    @classmethod
    def real(cls) -> Sizes:
        """As measured."""
        return cls(FLUX, LLAMA)


def configurations(work: Work, ranks: int) -> list[str]:
    """Names of the peer's configurations, the fastest known first."""
    if work.model == "llama":
        if ranks == 1:
            return ["CUDA graphs", "compiled"]
        return ["DTensor, CUDA graphs", "tp_plan, CUDA graphs", "DTensor, compiled"]
    return ["compiled blocks"] if ranks == 1 else ["Ulysses", "Ring"]


def step(work: Work, name: str, ranks: int, device: torch.device, sizes: Sizes, *, whole: bool = True) -> Step:
    """A function that runs the model once on this rank; compiled when it is first called.

    Args:
        whole: compile without breaks in the graph, or fail.
    """
    make = _llama if work.model == "llama" else _flux
    return make(work, name, ranks, device, sizes, whole)


def _randomise(model: torch.nn.Module) -> None:
    """Small random values, so that the arithmetic costs the power that it costs in earnest."""
    for parameter in model.parameters():
        getattr(parameter, "_local_tensor", parameter).uniform_(-0.02, 0.02)


# --- diffusers ----------------------------------------------------------------------------------------------


def _flux(work: Work, name: str, ranks: int, device: torch.device, sizes: Sizes, whole: bool) -> Step:
    from diffusers import ContextParallelConfig, FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**sizes.flux)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    _randomise(model)
    model.set_attention_backend("_native_cudnn" if device.type == "cuda" else "native")
    if ranks > 1:
        degree = "ring_degree" if name == "Ring" else "ulysses_degree"
        model.enable_parallelism(config=ContextParallelConfig(**{degree: ranks}))
    model.compile_repeated_blocks(fullgraph=whole, dynamic=False)
    inputs = flux_inputs(work, device, sizes)

    @torch.no_grad()
    def run() -> Any:
        return model(**inputs, return_dict=False)[0]

    return run


def flux_inputs(work: Work, device: torch.device, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Random inputs: a square image's and the text's. A thousand times the last two is exact in bf16 as well."""
    side, text = int((work.image // sizes.shrink) ** 0.5), TEXT // sizes.shrink
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, torch.bfloat16)

    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return {
        "hidden_states": normal(1, side * side, sizes.flux["in_channels"]),
        "encoder_hidden_states": normal(1, text, sizes.flux["joint_attention_dim"]),
        "pooled_projections": normal(1, sizes.flux["pooled_projection_dim"]),
        "timestep": torch.full((1,), 0.5, device=device, dtype=torch.bfloat16),
        "img_ids": ids.reshape(-1, 3).to(device, torch.bfloat16),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=torch.bfloat16),
        "guidance": torch.full((1,), 4.0, device=device, dtype=torch.bfloat16),
    }


# --- transformers -------------------------------------------------------------------------------------------


def _llama(work: Work, name: str, ranks: int, device: torch.device, sizes: Sizes, whole: bool) -> Step:
    from llama import last_logits

    model: torch.nn.Module = last_logits(sizes.llama, device)
    if ranks > 1:
        _share(model, name, ranks, device)
    _randomise(model)
    graphs = "graphs" in name and device.type == "cuda"
    compiled = torch.compile(model, dynamic=False, fullgraph=whole, mode="reduce-overhead" if graphs else None)
    ids = llama_tokens(work, device, sizes)

    @torch.no_grad()
    def run() -> Any:
        with _attention(device):
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            return compiled(ids)

    return run


def llama_tokens(work: Work, device: torch.device, sizes: Sizes) -> torch.Tensor:
    """Random tokens, [1, tokens]."""
    tokens = work.tokens if work.tokens == 1 else work.tokens // sizes.shrink
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, sizes.llama["vocab_size"], (1, tokens), generator=random).to(device)


def _share(model: torch.nn.Module, name: str, ranks: int, device: torch.device) -> None:
    """Cut the weights: attention and feed-forward as Megatron does, the logits by vocabulary."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(device.type, (ranks,))
    if name.startswith("tp_plan"):
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        plan = (model.tp_plan,) if "tp_plan" in inspect.signature(apply_tensor_parallelism).parameters else ()
        apply_tensor_parallelism(model, mesh, *plan)  # as the library's version has it
        return
    from torch.distributed.tensor import Replicate

    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    cut: dict[str, Any] = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    cut |= {f"model.layers.*.{part}": ColwiseParallel() for part in columns}
    cut |= {f"model.layers.*.{part}": RowwiseParallel() for part in ("self_attn.o_proj", "mlp.down_proj")}
    parallelize_module(model, mesh, cut, src_data_rank=None)


def _attention(device: torch.device) -> AbstractContextManager[Any]:
    """cuDNN's attention where it can, else FlashAttention."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
