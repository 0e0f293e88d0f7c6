"""Norms are found in every form that exporters write, and mean the same."""

from __future__ import annotations

import numpy as np
import pytest
from recognition import check, normal

N = 16
X = normal(2, 5, N)
CONSTANTS = {
    "two": np.float32(2),
    "eps": np.array([1e-5], np.float32),
    "half": np.float32(0.5),
    "minus": np.float32(-0.5),
    "one": np.float32(1),
    "zero": np.float32(0),
    "last": np.array([-1]),
    "middle": np.array([1]),
    "w": normal(N, seed=1) + 1,
    "b": normal(N, seed=2),
}
SQUARE = "d = Mul(x, x) m = ReduceMean<keepdims = 1>(d, last) a = Add(m, eps) "


@pytest.mark.parametrize(
    "body",
    [
        f"{SQUARE} r = Sqrt(a) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, w)",
        f"{SQUARE} r = Sqrt(a) i = Reciprocal(r) n = Mul(i, x) y = Mul(w, n)",
        f"{SQUARE} r = Sqrt(a) n = Div(x, r) y = Mul(n, w)",
        f"{SQUARE} r = Sqrt(a) i = Div(one, r) n = Mul(x, i) y = Mul(n, w)",
        f"{SQUARE} i = Pow(a, minus) n = Mul(x, i) y = Mul(n, w)",
        f"{SQUARE} r = Pow(a, half) n = Div(x, r) y = Mul(n, w)",
        f"{SQUARE} r = Sqrt(a) i = Reciprocal(r) iw = Mul(i, w) y = Mul(x, iw)",
        """d = Pow(x, two) m = ReduceMean<keepdims = 1>(d, last) a = Add(eps, m)
           r = Sqrt(a) n = Div(x, r) y = Mul(n, w)""",
    ],
)
def test_rms(body: str) -> None:
    result = check(body, {"x": X}, CONSTANTS)
    assert result.ops == {"RMSNormalization": 1}
    assert result.attribute("RMSNormalization", "epsilon") == pytest.approx(1e-5)
    assert result.node("RMSNormalization").inputs[1].name == "w"


def test_rms_without_scale() -> None:
    result = check(f"{SQUARE} r = Sqrt(a) y = Div(x, r)", {"x": X}, CONSTANTS)
    assert result.ops == {"RMSNormalization": 1}
    assert (result.node("RMSNormalization").inputs[1].const_value.numpy() == 1).all()


def test_rms_with_one_added_to_the_weight() -> None:
    """Gemma."""
    result = check(f"{SQUARE} r = Sqrt(a) n = Div(x, r) s = Add(w, one) y = Mul(n, s)", {"x": X}, CONSTANTS)
    assert result.ops == {"RMSNormalization": 1}


def test_modulation_is_no_scale() -> None:
    body = f"{SQUARE} r = Sqrt(a) n = Div(x, r) y = Mul(n, s)"
    assert check(body, {"x": X, "s": normal(1, 1, N)}, CONSTANTS).ops == {"RMSNormalization": 1, "Mul": 1}


def test_two_norms_of_one_value() -> None:
    body = f"{SQUARE} r = Sqrt(a) n = Div(x, r) y = Mul(n, w) z = Mul(n, b)"
    assert check(body, {"x": X}, CONSTANTS, ["y", "z"]).ops == {"RMSNormalization": 1, "Mul": 2}


UP = "x = Cast<to = 1>(h) "
HALF = {"h": X.astype(np.float16)}
HALF_CONSTANTS = {**CONSTANTS, "w": CONSTANTS["w"].astype(np.float16), "b": CONSTANTS["b"].astype(np.float16)}


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("n = Div(x, r) c = Cast<to = 10>(n) y = Mul(c, w)", {"RMSNormalization": 1}),
        ("n = Div(x, r) wf = Cast<to = 1>(w) m2 = Mul(n, wf) y = Cast<to = 10>(m2)", {"RMSNormalization": 1}),
        ("n = Div(x, r) y = Cast<to = 10>(n)", {"RMSNormalization": 1}),
        ("n = Div(x, r) m2 = Mul(n, wide) y = Cast<to = 10>(m2)", {"RMSNormalization": 1, "Cast": 2}),
    ],
)
def test_rms_in_half_precision(body: str, ops: dict[str, int]) -> None:
    constants = {**HALF_CONSTANTS, "wide": CONSTANTS["w"]}
    result = check(f"{UP} {SQUARE} r = Sqrt(a) {body}", HALF, constants, ["float16 y"])
    assert result.ops == ops


CENTRE = "u = ReduceMean<keepdims = 1>(x, last) d = Sub(x, u) "
VARIANCE = f"{CENTRE} q = Pow(d, two) m = ReduceMean<keepdims = 1>(q, last) a = Add(m, eps) r = Sqrt(a) "
FAST = """
    u = ReduceMean<keepdims = 1>(x, last) xx = Mul(x, x) m = ReduceMean<keepdims = 1>(xx, last) uu = Mul(u, u)
    v0 = Sub(m, uu) d = Sub(x, u) """
FLAX = "a = Add(v, eps) r = Sqrt(a) i = Reciprocal(r) iw = Mul(i, w) s = Mul(d, iw) y = Add(s, b)"
KERAS = "i = Reciprocal(r) iw = Mul(i, w) xi = Mul(x, iw) ui = Mul(u, iw) bu = Sub(b, ui) y = Add(xi, bu)"


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (f"{VARIANCE} n = Div(d, r) s = Mul(n, w) y = Add(s, b)", 3),
        (f"{VARIANCE} n = Div(d, r) s = Mul(w, n) y = Add(b, s)", 3),
        (f"{VARIANCE} d2 = Sub(x, u) n = Div(d2, r) s = Mul(n, w) y = Add(s, b)", 3),
        (f"{VARIANCE} i = Reciprocal(r) n = Mul(d, i) s = Mul(n, w) y = Add(s, b)", 3),
        (f"{VARIANCE} i = Reciprocal(r) iw = Mul(i, w) s = Mul(d, iw) y = Add(s, b)", 3),
        (f"{VARIANCE} {KERAS}", 3),
        (f"{FAST} v = Max(v0, zero) {FLAX}", 3),
        (f"{FAST} v = Identity(v0) {FLAX}", 3),
        (f"{VARIANCE} n = Div(d, r) y = Mul(n, w)", 2),
        (f"{VARIANCE} y = Div(d, r)", 2),
    ],
)  # fmt: skip
def test_layer_norm(body: str, inputs: int) -> None:
    result = check(body, {"x": X}, CONSTANTS)
    assert result.ops == {"LayerNormalization": 1}
    assert len(result.node("LayerNormalization").inputs) == inputs


def test_layer_norm_in_half_precision() -> None:
    body = f"{UP} {VARIANCE} n = Div(d, r) c = Cast<to = 10>(n) s = Mul(c, w) y = Add(s, b)"
    assert check(body, HALF, HALF_CONSTANTS, ["float16 y"]).ops == {"LayerNormalization": 1}


@pytest.mark.parametrize(
    ("body", "pattern", "reason"),
    [
        (SQUARE.replace("last", "middle") + "r = Sqrt(a) y = Div(x, r)", "RMSNormalization", "axes [1] of 3 dims"),
        (SQUARE + "r = Sqrt(a) y = Div(z, r)", "RMSNormalization", "not the one that was squared"),
        (SQUARE + "r = Sqrt(a) y = Sin(r)", "RMSNormalization", "Sin reads it"),
        (VARIANCE.replace("last", "middle") + "y = Div(d, r)", "LayerNormalization", "axes [1] of 3 dims"),
    ],
)
def test_near_miss(body: str, pattern: str, reason: str) -> None:
    result = check(body, {"x": X, "z": X + 1}, CONSTANTS)
    assert result.ops[pattern] == 0
    (found,) = result.misses(pattern)
    assert reason in found


@pytest.mark.parametrize("body", ["d = Mul(x, x) y = ReduceMean(d, last)", "y = ReduceMean(x, last)"])
def test_other_means_are_no_near_miss(body: str) -> None:
    assert not check(body, {"x": X}, CONSTANTS).findings
