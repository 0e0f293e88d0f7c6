"""LinearAttention, CausalConvWithState, TensorScatter and SwiGLU against ONNX's reference, whole and shared out."""

from __future__ import annotations

from typing import Any

import numpy as np
import one_node
import pytest

import onnxmesh
from onnxmesh.compiler.errors import ModelError

RNG = np.random.default_rng(2)
OPSET = 28
RULES = ("linear", "gated", "delta", "gated_delta")


def f(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (0.5 * RNG.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_update_rule_of_linear_attention(rule: str, past: bool) -> None:
    """4 heads of 6 features share 2 heads of keys; values have 4 features; a decay for each feature of a key."""
    decay = -np.abs(f(2, 5, 12)) if rule.startswith("gated") else None
    beta = RNG.uniform(0, 1, (2, 5, 2)).astype(np.float32) if rule.endswith("delta") else None
    inputs = [f(2, 5, 24), f(2, 5, 12), f(2, 5, 8), f(2, 2, 6, 4) if past else None, decay, beta]
    attrs = {"q_num_heads": 4, "kv_num_heads": 2, "update_rule": rule}
    one_node.check("LinearAttention", inputs, 2, opset=OPSET, **attrs)


def test_a_decay_and_a_rate_may_be_one_number_a_head() -> None:
    inputs = [f(2, 3, 8), f(2, 3, 8), f(2, 3, 8), None, -np.abs(f(2, 3, 2)), np.abs(f(2, 3, 1))]
    one_node.check("LinearAttention", inputs, 2, opset=OPSET, q_num_heads=2, kv_num_heads=2, scale=0.7)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    proto = one_node.model(
        "LinearAttention",
        [f(1, 2, 6), f(1, 2, 6), f(1, 2, 6)],
        2,
        opset=OPSET,
        q_num_heads=4,
        kv_num_heads=2,
        update_rule="linear",
    )
    with pytest.raises(ModelError, match="divisible by q_num_heads"):
        onnxmesh.compile(proto)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("size", [1, 4])
def test_a_causal_convolution_carries_its_last_inputs_on(size: int, activation: str) -> None:
    weight, bias = f(6, 1, size), f(6)
    for past in (None, f(2, 6, size - 1)):
        inputs = [f(2, 6, 3), weight, bias, past]
        one_node.check("CausalConvWithState", inputs, 2, opset=OPSET, activation=activation)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_a_cache_is_written_from_a_place_of_its_own_in_each_batch_entry(mode: str) -> None:
    first = np.array([1, 3] if mode == "linear" else [4, 3])
    one_node.check("TensorScatter", [f(2, 4, 5, 3), f(2, 4, 2, 3), first], mode=mode)
    one_node.check("TensorScatter", [f(2, 5, 4), f(2, 2, 4), first], mode=mode, axis=1)
    one_node.check("TensorScatter", [f(2, 5, 4), f(2, 2, 4)], mode=mode, axis=1)


def test_swiglu() -> None:
    one_node.check("SwiGLU", [f(2, 12), f(2, 12)], opset=OPSET, alpha=1.7)
