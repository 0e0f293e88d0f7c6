"""transformers' LlamaForCausalLM as both sides of the comparison use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama


class LastLogits(LlamaForCausalLM):
    """The logits of the last token, [1, 1, vocabulary], and no cache."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits


def last_logits(sizes: Mapping[str, Any], device: torch.device | str) -> LastLogits:
    """The model in bf16 with parameters that hold whatever the memory held.

    A causal mask that says nothing but "causal" is left to the attention kernel, which is faster on either side: while
    a graph is traced, transformers cannot see that no sequences are packed and would make a mask for them.
    """
    modeling_llama.create_causal_mask = lambda *_, **__: None
    config = LlamaConfig(**sizes, attn_implementation="sdpa", use_cache=False)
    with torch.device("meta"):
        model = LastLogits(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its table is no parameter
    return model
