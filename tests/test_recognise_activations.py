"""Activations are found however their product and polynomial are written."""

from __future__ import annotations

import numpy as np
import pytest
from recognition import check, normal

X = normal(3, 40) * 3
NUMBERS = {
    "half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "root": 2**0.5, "inverse": 0.5**0.5, "wrong": 1.41,
    "c": (2 / np.pi) ** 0.5, "k": 0.044715, "ck": (2 / np.pi) ** 0.5 * 0.044715, "alpha": 1.702, "minus": -1.0,
    "c2": 2 * (2 / np.pi) ** 0.5,
}  # fmt: skip
CONSTANTS = {name: np.array(number, np.float32) for name, number in NUMBERS.items()}
ERF = "u = Div(x, root) e = Erf(u) a = Add(e, one) "
CUBE = "x3 = Pow(x, three) kx = Mul(x3, k) s = Add(x, kx) u = Mul(s, c) "
TANH = f"{CUBE} e = Tanh(u) a = Add(e, one) "


@pytest.mark.parametrize(
    ("body", "approximate"),
    [
        (f"{ERF} h = Mul(x, half) y = Mul(h, a)", "none"),
        (f"{ERF} h = Mul(x, a) y = Mul(h, half)", "none"),
        (f"{ERF} h = Mul(half, a) y = Mul(x, h)", "none"),
        (f"{ERF} h = Mul(x, a) y = Div(h, two)", "none"),
        ("u = Mul(inverse, x) e = Erf(u) a = Add(one, e) h = Mul(half, x) y = Mul(a, h)", "none"),
        (f"{TANH} h = Mul(x, half) y = Mul(h, a)", "tanh"),
        (f"{TANH} h = Mul(half, a) y = Mul(x, h)", "tanh"),
        (f"{CUBE.replace('Pow(x, three)', 'Mul(x, xx)').replace('x3 =', 'xx = Mul(x, x) x3 =', 1)} e = Tanh(u)"
         " a = Add(e, one) h = Mul(x, a) y = Mul(h, half)", "tanh"),
        ("xc = Mul(x, c) xk = Mul(x, k) xx = Mul(xk, x) q = Add(xx, one) u = Mul(xc, q) e = Tanh(u)"
         " a = Add(e, one) h = Mul(x, half) y = Mul(a, h)", "tanh"),
        ("x2 = Pow(x, two) k2 = Mul(x2, ck) q = Add(k2, c) u = Mul(x, q) e = Tanh(u) a = Add(e, one)"
         " h = Mul(x, half) y = Mul(a, h)", "tanh"),
        (f"{CUBE.replace('c)', 'c2)')} e = Sigmoid(u) y = Mul(x, e)", "tanh"),
    ],
)  # fmt: skip
def test_gelu(body: str, approximate: str) -> None:
    result = check(body, {"x": X}, CONSTANTS)
    assert result.ops == {"Gelu": 1}
    assert result.attribute("Gelu", "approximate") == approximate


def test_gelu_in_half_precision() -> None:
    constants = {name: array.astype(np.float16) for name, array in CONSTANTS.items()}
    body = f"{TANH} h = Mul(x, half) y = Mul(h, a)"
    assert check(body, {"x": X.astype(np.float16)}, constants, ["float16 y"]).ops == {"Gelu": 1}


def test_gelu_behind_a_bias() -> None:
    """x is itself a sum: it is the factor, not a leaf of the graph."""
    result = check(f"x = Add(x0, one) {TANH} h = Mul(x, half) y = Mul(h, a)", {"x0": X}, CONSTANTS)
    assert result.ops == {"Add": 1, "Gelu": 1}


@pytest.mark.parametrize(
    ("body", "alpha"),
    [
        ("e = Sigmoid(x) y = Mul(x, e)", 1),
        ("e = Sigmoid(x) y = Mul(e, x)", 1),
        ("u = Mul(x, alpha) e = Sigmoid(u) y = Mul(x, e)", 1.702),
    ],
)
def test_swish(body: str, alpha: float) -> None:
    result = check(body, {"x": X}, CONSTANTS)
    assert result.ops == {"Swish": 1}
    assert result.attribute("Swish", "alpha") == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("e = Sigmoid(g) s = Mul(g, e) y = Mul(s, u)", "SwiGLU"),
        ("t = Div(g, root) e = Erf(t) a = Add(e, one) h = Mul(g, half) s = Mul(h, a) y = Mul(u, s)", "GeGLU"),
    ],
)
def test_gated(body: str, name: str) -> None:
    result = check(f"g = MatMul(x, wg) u = MatMul(x, wu) {body}", {"x": X}, {
        **CONSTANTS, "wg": normal(40, 8) / 8, "wu": normal(40, 8, seed=1) / 8
    })  # fmt: skip
    assert [f.pattern for f in result.findings if f.found].count(name) == 1
    assert result.ops["Mul"] == 1


def test_linear_with_bias_is_recorded() -> None:
    result = check("m = MatMul(x, w) y = Add(b, m)", {"x": X}, {"w": normal(40, 8) / 8, "b": normal(8)})
    assert [f.pattern for f in result.findings] == ["Linear"]
    assert result.ops == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize(
    ("body", "pattern", "reason"),
    [
        (f"{ERF.replace('root', 'wrong')} h = Mul(x, half) y = Mul(h, a)", "Gelu", "x^1 is 0.70922, expected 0.707107"),
        (f"{ERF} y = Mul(x, a)", "Gelu", "the factor is 1, expected 0.5"),
        (f"{TANH.replace('k)', 'half)')} h = Mul(x, half) y = Mul(h, a)", "Gelu", "x^3 is 0.398942"),
        ("q = Pow(x, two) e = Sigmoid(q) y = Mul(x, e)", "Swish", "powers [2]"),
    ],
)
def test_near_miss(body: str, pattern: str, reason: str) -> None:
    result = check(body, {"x": X}, CONSTANTS)
    assert result.ops[pattern] == 0
    (found,) = result.misses(pattern)
    assert reason in found


@pytest.mark.parametrize(
    "body", ["y = Tanh(x)", "y = Sigmoid(x)", "e = Sigmoid(z) y = Mul(x, e)", "e = Erf(x) y = Add(e, one)"]
)
def test_other_uses_are_no_near_miss(body: str) -> None:
    assert not check(body, {"x": X, "z": X + 1}, CONSTANTS).findings
