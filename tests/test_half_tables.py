"""Half tables: tables of a Rotary that hold every value twice are halved, whatever stands between."""

from __future__ import annotations

import numpy as np
import pytest
from recognition import Result, check, normal

B, H, S, D = 2, 3, 5, 8
X, IDS = normal(B, H, S, D), np.arange(S, dtype=np.float32)[:, None]
CONSTANTS = {
    "n0": np.array([0]), "n1": np.array([1]), "n2": np.array([2]), "n4": np.array([4]), "end": np.array([2**62]),
    "last": np.array([-1]), "i0": np.array(0), "i1": np.array(1), "pairs": np.array([B, H, S, D // 2, 2]),
    "whole": np.array([B, H, S, D]), "f": normal(D // 2, seed=3), "g": normal(1, seed=4), "h": normal(3, seed=5),
    "twice": np.array([S, D // 2, 2]), "row": np.array([S, D]), "two": np.float32(2), "unit": np.array([1, 1, S, D]),
}  # fmt: skip
HALVES = """
    x1 = Slice(x, n0, n4, last) x2 = Slice(x, n4, end, last) m = Neg(x2) r = Concat<axis = -1>(m, x1)
    xc = Mul(x, cos) rs = Mul(r, sin) y = Add(xc, rs) """
PAIRS = """
    xp = Reshape(x, pairs) x1 = Gather<axis = 4>(xp, i0) x2 = Gather<axis = 4>(xp, i1) m = Neg(x2)
    mu = Unsqueeze(m, n4) xu = Unsqueeze(x1, n4) st = Concat<axis = 4>(mu, xu) r = Reshape(st, whole)
    xc = Mul(x, cos) rs = Mul(r, sin) y = Add(xc, rs) """


def tables(result: Result) -> list[tuple[int, ...]]:
    """The shapes of cos and sin."""
    return [tuple(v.shape.numpy()) for v in result.node("Rotary").inputs[1:] if v is not None and v.shape is not None]


def test_angles_that_are_joined_with_themselves() -> None:
    body = f"a = Mul(ids, f) e = Concat<axis = -1>(a, a) ec = Cos(e) cos = Mul(ec, two) sin = Sin(e) {HALVES}"
    result = check(body, {"x": X, "ids": IDS}, CONSTANTS)
    assert tables(result) == [(S, D // 2)] * 2 and "Concat" not in result.ops


def test_tables_of_pairs_in_a_row() -> None:
    body = f"""
        a = Mul(ids, f) ac = Cos(a) cu = Unsqueeze(ac, n2) ce = Expand(cu, twice) cr = Reshape(ce, row)
        cos = Reshape(cr, unit) as = Sin(a) su = Unsqueeze(as, n2) se = Concat<axis = 2>(su, su) sin = Reshape(se, row)
        {PAIRS}"""
    result = check(body, {"x": X, "ids": IDS}, CONSTANTS)
    assert tables(result) == [(1, 1, S, D // 2), (S, D // 2)] and not {"Expand", "Concat"} & result.ops.keys()


def test_tables_joined_from_several_axes() -> None:
    body = """
        ag = Mul(ids, g) gu = Unsqueeze(ag, n2) gp = Concat<axis = 2>(gu, gu) ge = Flatten(gp)
        ah = Mul(ids, h) hu = Unsqueeze(ah, n2) hp = Concat<axis = 2>(hu, hu) he = Flatten(hp)
        e = Concat<axis = 1>(ge, he) cos = Cos(e) sin = Sin(e) """
    result = check(body + PAIRS, {"x": X, "ids": IDS}, CONSTANTS)
    assert tables(result) == [(S, D // 2)] * 2 and result.ops["Concat"] == 1


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_of_a_table_of_the_model(interleaved: bool) -> None:
    half = normal(2 * S, D // 2, seed=6)
    table = np.repeat(half, 2, axis=1) if interleaved else np.concatenate([half, half], axis=1)
    constants = {**CONSTANTS, "table": table, "scale": np.full(D, 0.5, np.float32)}
    body = f"cos = Gather(table, at) sin = Mul(cos, scale) {PAIRS if interleaved else HALVES}"
    result = check(body, {"x": X, "at": np.array([3, 1, 4, 0, 9])}, constants)
    assert tables(result) == [(S, D // 2)] * 2


@pytest.mark.parametrize("case", ["one", "other way", "rolled"])
def test_tables_that_hold_no_value_twice_stay(case: str) -> None:
    joined = "a = Mul(ids, f) e = Concat<axis = -1>(a, a) cos = Cos(e) "
    sin = {"one": "sin = Mul(cos, t)", "other way": "sin = Sin(e)", "rolled": "sin = Gather<axis = 1>(e, roll)"}[case]
    constants = {**CONSTANTS, "t": normal(D, seed=7), "roll": np.array([1, 0, 2, 3, 4, 5, 6, 7])}
    result = check(joined + sin + (PAIRS if case == "other way" else HALVES), {"x": X, "ids": IDS}, constants)
    assert tables(result) == [(S, D)] * 2
