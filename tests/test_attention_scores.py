"""Attention that gives out its scores, against ONNX's reference, whole and with heads or batch shared out."""

from __future__ import annotations

from typing import Any

import numpy as np
import one_node
import pytest

import onnxmesh

RNG = np.random.default_rng(4)
HEADS, GROUPS, ROWS, KEYS, OLD, SIZE = 4, 2, 3, 5, 2, 8
RAW, CAPPED, MASKED, PROBABILITIES = range(4)
CACHE = (1, 2)


def f(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


Q, K, V = f(2, HEADS, ROWS, SIZE), f(2, GROUPS, KEYS, SIZE), f(2, GROUPS, KEYS, 6)
PAST = f(2, GROUPS, OLD, SIZE), f(2, GROUPS, OLD, 6)
SEES = RNG.random((2, 1, ROWS, KEYS)) < 0.6
SEES[1, 0, 1] = False


@pytest.mark.parametrize("mode", [CAPPED, MASKED, PROBABILITIES])
def test_scores_after_each_step(mode: int) -> None:
    """Grouped heads, a soft cap, a boolean mask in which one row sees nothing."""
    given: dict[str, Any] = {"qk_matmul_output_mode": mode, "softcap": 1.5, "is_causal": 1}
    one_node.check("Attention", [Q, K, V, SEES], 4, absent=CACHE, **given)


def test_raw_scores_are_neither_capped_nor_masked() -> None:
    """As ONNX says it; its reference evaluator caps them."""
    proto = one_node.model("Attention", [Q, K, V, SEES], 4, absent=CACHE, softcap=1.5)
    _, scores = one_node.run(onnxmesh.compile(proto), [Q, K, V, SEES])
    keys = K.repeat(HEADS // GROUPS, axis=1)
    np.testing.assert_allclose(scores, Q @ keys.swapaxes(2, 3) / SIZE**0.5, 1e-5, 1e-6)


def test_scores_with_a_cache_and_a_mask_that_is_added() -> None:
    bias = f(ROWS, OLD + KEYS)
    for mode in (RAW, MASKED, PROBABILITIES):
        one_node.check("Attention", [Q, K, V, bias, *PAST], 4, is_causal=1, qk_matmul_output_mode=mode)


def test_scores_without_any_mask_of_inputs_whose_heads_stand_side_by_side() -> None:
    flat = f(2, ROWS, HEADS * SIZE), f(2, KEYS, GROUPS * SIZE), f(2, KEYS, GROUPS * 6)
    heads = {"q_num_heads": HEADS, "kv_num_heads": GROUPS}
    one_node.check("Attention", flat, 4, absent=CACHE, scale=0.2, qk_matmul_output_mode=PROBABILITIES, **heads)


def test_the_softmax_may_be_more_precise_than_the_scores() -> None:
    halves = [x.astype(np.float16) for x in (Q, K, V)]
    given: dict[str, Any] = {"softmax_precision": 1, "qk_matmul_output_mode": PROBABILITIES}
    one_node.check("Attention", [*halves, SEES], 4, absent=CACHE, rtol=2e-3, atol=1e-3, **given)
