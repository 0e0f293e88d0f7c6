"""Attention, its blocks, rotary embeddings and fused expressions, against their definitions."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

RNG = np.random.default_rng(11)
B, H, G, S, T, D, E = 2, 4, 2, 5, 7, 8, 6


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def run(op: str, inputs: list[Any], outs: list[tuple[Any, tuple[int, ...]]], **attrs: Any) -> Any:
    types = tuple(TensorType(np.dtype(dtype), shape) for dtype, shape in outs)
    return find(op)(Call(np, attrs, types, {}), *inputs)


def attend(inputs: list[Any], **attrs: Any) -> np.ndarray:
    q, v = inputs[0], inputs[2]
    return run("Attention", inputs, [(q.dtype, (*q.shape[:3], v.shape[3]))], **attrs)


def definition(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    q_pos: Any = None,
    k_pos: Any = None,
    *,
    scale: float,
    softcap: float = 0.0,
    masked_row: str = "nan",
) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = scale * q @ k.swapaxes(2, 3)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    hidden = -np.finfo(np.float32).max if masked_row == "uniform" else -np.inf
    if mask is not None:
        scores = np.where(mask, scores, hidden) if mask.dtype == bool else scores + mask
    if q_pos is not None:
        scores = np.where(k_pos[None] <= q_pos[:, None], scores, hidden)
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities = powers / powers.sum(-1, keepdims=True)
    return (np.nan_to_num(probabilities) if masked_row == "zero" else probabilities) @ v


def qkv() -> list[Any]:
    return [f(B, H, S, D), f(B, G, T, D), f(B, G, T, E)]


MASKS = {
    "none": None,
    "bool": RNG.random((B, 1, S, T)) < 0.6,
    "bool-heads": RNG.random((1, H, S, T)) < 0.6,
    "keys": RNG.random((B, 1, 1, T)) < 0.6,
    "additive": f(1, 1, S, T),
    "additive-heads": f(B, H, 1, T),
}
CAUSAL = {
    "all": (None, None),
    "causal": (np.arange(S) + 2, np.arange(T)),
    "first-row-empty": (np.arange(S) - 1, np.arange(T)),
}


@pytest.mark.parametrize("budget", [1 << 24, 500, 4])
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("mask", MASKS)
def test_attention(mask: str, causal: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxmesh.runtime.kernels.attention._SCORE_BYTES", budget)
    inputs = [*qkv(), MASKS[mask], *CAUSAL[causal]]
    for attrs in (
        {"scale": 0.3, "masked_row": "zero"},
        {"scale": 0.3, "softcap": 2.0},
        {"scale": 1.0, "masked_row": "uniform"},
    ):
        np.testing.assert_allclose(attend(inputs, **attrs), definition(*inputs, **attrs), 2e-5, 2e-6)


@pytest.mark.parametrize("masked_row", ["nan", "zero", "uniform"])
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_of_keys_merge_to_attention(mask: str, causal: str, masked_row: str) -> None:
    (q, k, v), (q_pos, k_pos), whole = qkv(), CAUSAL[causal], MASKS[mask]
    attrs = {"scale": 0.4, "masked_row": masked_row}
    o, m = (np.float32, (B, H, S, E)), (np.float32, (B, H, S, 1))
    state: Any = None
    for keys in (slice(0, 3), slice(3, 4), slice(4, 7)):
        part = None if whole is None else whole[..., keys]
        positions = (q_pos, None if k_pos is None else k_pos[keys])
        block = run("AttentionBlock", [q, k[:, :, keys], v[:, :, keys], part, *positions], [o, m, m], **attrs)
        state = block if state is None else run("AttentionMerge", [*state, *block], [o, m, m])
    got = run("AttentionFinish", [state[0], state[2]], [o], masked_row=masked_row)
    np.testing.assert_allclose(got, definition(q, k, v, whole, q_pos, k_pos, **attrs), 2e-5, 2e-6)


def test_a_block_without_visible_keys_is_empty() -> None:
    q, k, v = qkv()
    shapes = [(np.float32, (B, H, S, E)), *[(np.float32, (B, H, S, 1))] * 2]
    o, m, l = run("AttentionBlock", [q, k, v, np.zeros((1, 1, 1, T), bool)], shapes, scale=1.0, masked_row="zero")
    assert not o.any()
    assert np.isneginf(m).all()
    assert not l.any()


def test_merge_takes_log_sum_exp_and_one() -> None:
    q, k, v = qkv()
    o, m = (np.float32, (B, H, S, E)), (np.float32, (B, H, S, 1))
    parts = [
        run("AttentionBlock", [q, k[:, :, at], v[:, :, at]], [o, m, m], scale=0.5) for at in (slice(0, 4), slice(4, 7))
    ]
    as_lse = [x for o1, m1, l1 in parts for x in (o1, m1 + np.log(l1), np.ones_like(l1))]
    got, _, _ = run("AttentionMerge", as_lse, [o, m, m])
    np.testing.assert_allclose(got, definition(q, k, v, scale=0.5), 2e-5, 2e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_attention_of_narrow_floats_rounds_once(dtype: Any) -> None:
    inputs = [x.astype(dtype) for x in qkv()]
    want = attend([x.astype(np.float32) for x in inputs], scale=0.3).astype(dtype)
    np.testing.assert_array_equal(attend(inputs, scale=0.3).astype(np.float32), want.astype(np.float32))


def rotary_definition(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: int) -> np.ndarray:
    d = x.shape[-1]
    if interleaved:
        rotated = np.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)
        full = [np.repeat(t, 2, -1) if t.shape[-1] != d else t for t in (cos, sin)]
    else:
        rotated = np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1)
        full = [np.concatenate([t, t], -1) if t.shape[-1] != d else t for t in (cos, sin)]
    return x * full[0] + rotated * full[1]


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("last", [D, D // 2])
@pytest.mark.parametrize("shape", [(S,), (1, 1, S), (B, 1, S)])
def test_rotary(shape: tuple[int, ...], last: int, interleaved: int) -> None:
    x, cos, sin = f(B, H, S, D), f(*shape, last), f(*shape, last)
    got = run("Rotary", [x, cos, sin], [(np.float32, x.shape)], interleaved=interleaved)
    np.testing.assert_allclose(got, rotary_definition(x, cos, sin, interleaved), 1e-5, 1e-6)


def test_fused_expressions_round_like_the_ops_alone() -> None:
    x, y = f(3, 4).astype(ml_dtypes.bfloat16), f(4).astype(ml_dtypes.bfloat16)
    expr = json.loads('["Where", ["Greater", 0, 1], ["Mul", ["Sigmoid", 0], 0], ["Gelu", {"approximate": "tanh"}, 1]]')
    got = run("Fused", [x, y], [(ml_dtypes.bfloat16, (3, 4))], expr=expr)
    out = [(ml_dtypes.bfloat16, (3, 4))]
    gated = run("Mul", [run("Sigmoid", [x], out), x], out)
    gelu = run("Gelu", [y], [(ml_dtypes.bfloat16, (4,))], approximate="tanh")
    want = np.where(x > y, gated, gelu)
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


def test_fused_cast_and_predicates_have_their_dtypes() -> None:
    x = np.array([1, -2], np.int32)
    got = run(
        "Fused",
        [x],
        [(np.float32, (2,))],
        expr=["Div", ["Cast", {"to": "float32"}, 0], ["Cast", {"to": "float32"}, ["Less", 0, 0]]],
    )
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [math.inf, -math.inf])


@pytest.mark.parametrize("expr", [["MatMul", 0, 0], 3, ["Add"], "Add", ["Add", -1, 0], [["Add"], 0, 1]])
def test_what_is_no_fused_expression_is_refused(expr: Any) -> None:
    with pytest.raises(PlanError, match="fused expression"):
        run("Fused", [f(2)], [(np.float32, (2,))], expr=expr)


@pytest.mark.parametrize("flat", [False, True])
def test_shard_cuts_segments(flat: bool) -> None:
    segments = [4, 1, 2, 2] if flat else [[4, 1], [2, 2]]
    attrs = {"axis": "tp", "dim": 1, "segments": segments}
    x = np.arange(12).reshape(2, 6)
    out = (TensorType(x.dtype, (2, 4)),)
    pieces = [find("Shard")(Call(np, attrs, out, {"tp": i}), x) for i in range(2)]
    np.testing.assert_array_equal(pieces[0], x[:, [0, 1, 4, 5]])
    np.testing.assert_array_equal(pieces[1], x[:, [2, 3, 4, 5]])
