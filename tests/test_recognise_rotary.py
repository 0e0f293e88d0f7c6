"""Rotary embeddings are found in every form that exporters write, and mean the same."""

from __future__ import annotations

import numpy as np
import pytest
from recognition import check, normal

B, H, S, D = 2, 3, 5, 8
X = normal(B, H, S, D)
TABLES = {"cos": normal(1, 1, S, D, seed=1), "sin": normal(S, D, seed=2)}
HALF_TABLES = {"cos": normal(1, 1, S, D // 2, seed=1), "sin": normal(S, D // 2, seed=2)}
INPUTS = {"x": X, **TABLES}
CONSTANTS = {
    "n0": np.array([0]), "n1": np.array([1]), "n2": np.array([2]), "n4": np.array([4]), "n8": np.array([8]),
    "i0": np.array(0), "i1": np.array(1), "last": np.array([-1]), "end": np.array([2**62]),
    "minus": np.float32(-1), "pairs": np.array([B, H, S, D // 2, 2]), "halves": np.array([B, H, S, 2, D // 2]),
    "whole": np.array([B, H, S, D]),
}  # fmt: skip
SLICES = "x1 = Slice(x, n0, n4, last) x2 = Slice(x, n4, end, last) "
STRIDES = "x1 = Slice(x, n0, end, last, n2) x2 = Slice(x, n1, end, last, n2) "
PAIRS = "xp = Reshape(x, pairs) x1 = Gather<axis = 4>(xp, i0) x2 = Gather<axis = -1>(xp, i1) "
UNBOUND = """
    xp = Reshape(x, pairs) a = Slice(xp, n0, n1, n4) x1 = Squeeze(a, n4) b = Slice(xp, n1, n2, n4)
    x2 = Squeeze(b, n4) """
ROTATE = "m = Neg(x2) r = Concat<axis = -1>(m, x1) "
STACK = "m = Neg(x2) mu = Unsqueeze(m, n4) xu = Unsqueeze(x1, n4) st = Concat<axis = 4>(mu, xu) r = Reshape(st, whole) "
SUM = "xc = Mul(x, cos) rs = Mul(r, sin) y = Add(xc, rs)"


@pytest.mark.parametrize(
    ("body", "interleaved"),
    [
        (f"{SLICES} {ROTATE} {SUM}", 0),
        (f"x1, x2 = Split<axis = 3, num_outputs = 2>(x) {ROTATE} {SUM}", 0),
        (f"{SLICES} m = Mul(x2, minus) r = Concat<axis = 3>(m, x1) xc = Mul(cos, x) rs = Mul(sin, r)"
         " y = Add(rs, xc)", 0),
        (f"xp = Reshape(x, halves) x1 = Gather<axis = 3>(xp, i0) x2 = Gather<axis = -2>(xp, i1) {ROTATE} {SUM}", 0),
        (f"{PAIRS} {STACK} {SUM}", 1),
        (f"{UNBOUND} {STACK} {SUM}", 1),
        (f"{STRIDES} {STACK} {SUM}", 1),
        (f"xp = Reshape(x, pairs) x1, x2 = Split<axis = 4, num_outputs = 2>(xp) m = Neg(x2)"
         f" st = Concat<axis = 4>(m, x1) r = Reshape(st, whole) {SUM}", 1),
    ],
)  # fmt: skip
def test_rotate(body: str, interleaved: int) -> None:
    result = check(body, INPUTS, CONSTANTS)
    assert result.ops == {"Rotary": 1}
    assert result.attribute("Rotary", "interleaved") == interleaved


PRODUCTS = "a1 = Mul(x1, cos) b1 = Mul(x2, sin) o1 = Sub(a1, b1) a2 = Mul(x2, cos) b2 = Mul(x1, sin) o2 = Add(a2, b2) "
JOIN = "y = Concat<axis = -1>(o1, o2)"
JOIN_PAIRS = "u1 = Unsqueeze(o1, n4) u2 = Unsqueeze(o2, n4) st = Concat<axis = -1>(u1, u2) y = Reshape(st, whole)"
FULL = """
    c1 = Slice(cos, n0, n4, last) c2 = Slice(cos, n4, n8, last) s1 = Slice(sin, n0, n4, last)
    s2 = Slice(sin, n4, n8, last) a1 = Mul(x1, c1) b1 = Mul(x2, s1) o1 = Sub(a1, b1)
    a2 = Mul(s2, x1) b2 = Mul(c2, x2) o2 = Add(a2, b2) """


@pytest.mark.parametrize(
    ("body", "tables", "interleaved"),
    [
        (f"{SLICES} {PRODUCTS} {JOIN}", HALF_TABLES, 0),
        (f"x1, x2 = Split<axis = 3, num_outputs = 2>(x) {PRODUCTS} {JOIN}", HALF_TABLES, 0),
        (f"{SLICES} {PRODUCTS.replace('Add(a2, b2)', 'Add(b2, a2)')} {JOIN}", HALF_TABLES, 0),
        (f"{STRIDES} {PRODUCTS} {JOIN_PAIRS}", HALF_TABLES, 1),
        (f"{PAIRS} {PRODUCTS} {JOIN_PAIRS}", HALF_TABLES, 1),
        (f"{UNBOUND} {PRODUCTS} {JOIN_PAIRS}", HALF_TABLES, 1),
        (f"{SLICES} {FULL} {JOIN}", TABLES, 0),
    ],
)
def test_parts(body: str, tables: dict[str, np.ndarray], interleaved: int) -> None:
    result = check(body, {"x": X, **tables}, CONSTANTS)
    assert result.ops == {"Rotary": 1}
    assert result.attribute("Rotary", "interleaved") == interleaved


@pytest.mark.parametrize("step", [1, 2])
def test_parts_written_into_a_tensor(step: int) -> None:
    """Wan at opset 18: `out[..., 0::2] = ..`, as two ScatterND over the transposed tensor."""
    first = np.arange(D // 2)[:, None] * step
    constants = {
        **CONSTANTS, "rows1": first, "rows2": first + (1 if step == 2 else D // 2),
        "empty": np.zeros((D, H, S, B), np.float32),
    }  # fmt: skip
    body = f"""{STRIDES if step == 2 else SLICES} {PRODUCTS}
        t1 = Transpose<perm = [3, 1, 2, 0]>(o1) w1 = ScatterND(empty, rows1, t1)
        t2 = Transpose<perm = [3, 1, 2, 0]>(o2) w2 = ScatterND(w1, rows2, t2)
        y = Transpose<perm = [3, 1, 2, 0]>(w2)"""
    result = check(body, {"x": X, **HALF_TABLES}, constants)
    assert result.ops == {"Rotary": 1}
    assert result.attribute("Rotary", "interleaved") == step - 1


@pytest.mark.parametrize(("apart", "join", "interleaved"), [(STRIDES, JOIN, 0), (SLICES, JOIN_PAIRS, 1)])
def test_pairs_taken_apart_and_put_together_as_halves(apart: str, join: str, interleaved: int) -> None:
    """DeepSeek: the features come out in another order than they went in."""
    result = check(f"{apart} {PRODUCTS} {join}", {"x": X, **HALF_TABLES}, CONSTANTS)
    assert result.ops == {"Reshape": 2, "Transpose": 1, "Rotary": 1}
    assert result.attribute("Rotary", "interleaved") == interleaved


@pytest.mark.parametrize("order", ["rest, o1, o2", "o1, o2, rest"])
def test_put_together_with_what_is_not_rotated(order: str) -> None:
    body = f"{SLICES} {PRODUCTS} y = Concat<axis = -1>({order})"
    result = check(body, {"x": X, "rest": normal(B, H, S, 6), **HALF_TABLES}, CONSTANTS)
    assert result.ops == {"Rotary": 1, "Concat": 1}


def test_heads_split_together_with_the_pairs() -> None:
    body = f"xp = Reshape(x, pairs) {PAIRS.split('xp = Reshape(x, pairs)')[1]} {PRODUCTS} {JOIN_PAIRS}"
    result = check(body, {"x": X.reshape(B, H * S * D), **HALF_TABLES}, CONSTANTS)
    assert result.ops == {"Reshape": 1, "Rotary": 1}


def test_in_float_of_half_precision() -> None:
    body = f"""{SLICES} {ROTATE} xf = Cast<to = 1>(x) rf = Cast<to = 1>(r) xc = Mul(xf, cos) rs = Mul(rf, sin)
        z = Add(xc, rs) y = Cast<to = 10>(z)"""
    result = check(body, {**INPUTS, "x": X.astype(np.float16)}, CONSTANTS, ["float16 y"])
    assert result.ops == {"Cast": 2, "Rotary": 1}


def test_of_a_part_of_the_head() -> None:
    body = f"x0 = Slice(z, n0, n8, last) rest = Slice(z, n8, end, last) x = Identity(x0) {SLICES} {ROTATE} "
    body += f"{SUM.replace('y =', 'o =')} y = Concat<axis = 3>(o, rest)"
    result = check(body, {"z": normal(B, H, S, D + 6), **TABLES}, CONSTANTS)
    assert result.ops == {"Slice": 2, "Rotary": 1, "Concat": 1}


def test_of_two_features() -> None:
    constants = {**CONSTANTS, "n4": np.array([1])}
    inputs = {"x": X[..., :2], "cos": TABLES["cos"][..., :2], "sin": TABLES["sin"][:, :2]}
    result = check(f"{SLICES} {ROTATE} {SUM}", inputs, constants)
    assert result.ops == {"Rotary": 1}
    assert result.attribute("Rotary", "interleaved") == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{SLICES} m = Neg(x1) r = Concat<axis = -1>(m, x2) {SUM}", "rotated the other way"),
        (f"{STRIDES} {ROTATE} {SUM}", "taken apart one way and put together the other way"),
        (f"{SLICES} {ROTATE} xc = Mul(x, cos) rs = Mul(r, sin) y = Sub(xc, rs)", "not added to one value"),
        (f"{SLICES} {ROTATE} rs = Mul(r, sin) y = Add(x, rs)", "is not a product"),
        (f"{SLICES} {ROTATE} zc = Mul(z, cos) rs = Mul(r, sin) y = Add(zc, rs)", "of the same x"),
        (f"{SLICES} {ROTATE} xc = Mul(x, one) rs = Mul(r, sin) y = Add(xc, rs)", "the last dim 1, expected 8"),
        (f"x1 = Slice(x, n0, n2, last) x2 = Slice(x, n2, n8, last) {ROTATE} {SUM}", "not the two halves"),
    ],
)
def test_near_miss(body: str, reason: str) -> None:
    constants = {**CONSTANTS, "one": normal(S, 1)}
    result = check(body, {**INPUTS, "z": X + 1}, constants)
    assert result.ops["Rotary"] == 0
    (found,) = result.misses("Rotary")
    assert reason in found


def test_other_concats_are_no_near_miss() -> None:
    assert not check("y = Concat<axis = 3>(x, x) ", INPUTS).findings
    assert not check(f"{SLICES} y = Concat<axis = 3>(x2, x1) ", INPUTS, CONSTANTS).findings
