"""Cast between every pair of dtypes, and BitCast: what the tables of the ONNX operator documents say."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.runtime.dtypes import dtype, float_max, is_for_hosts, is_narrow, is_small_integer, limits, ort_type, wider
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
FLOATS = ("float64", "float32", "float16", "bfloat16", *FLOAT8, "float4_e2m1fn")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16, 32, 64))
ALL = (*FLOATS, *INTEGERS, "bool", "float8_e8m0fnu")
NAN, INF = np.nan, np.inf


def cast(x: np.ndarray, to: str, **attrs: Any) -> np.ndarray:
    result = find("Cast")(Call(np, {"to": to, **attrs}, (TensorType(dtype(to), x.shape),), {}), x)
    assert result.dtype == dtype(to)
    return result


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(("source", "target"), itertools.product(ALL, ALL))
def test_one_is_one_in_every_dtype(source: str, target: str) -> None:
    one = cast(np.ones((2, 3), np.float32), source)
    assert (
        cast(one, target).astype(wider(dtype(target))) == cast(floats(1), target).astype(wider(dtype(target)))
    ).all()


@pytest.mark.parametrize("target", INTEGERS)
def test_floats_lose_what_is_behind_the_point(target: str) -> None:
    low, high = limits(dtype(target))
    x = floats(0.9, min(high, 100) + 0.75, max(low, -100) - (0.75 if low else 0))
    np.testing.assert_array_equal(cast(x, target).astype(np.int64), [0, min(high, 100), max(low, -100)])


@pytest.mark.parametrize("target", [name for name in INTEGERS if "64" not in name])
def test_integers_keep_their_lowest_bits(target: str) -> None:
    bits = int(target.lstrip("uint"))
    x = np.array([0, 1, -1, 200, -129, 2**40 + 3], np.int64)
    got = cast(x, target).astype(np.int64)
    np.testing.assert_array_equal(got % 2**bits, x % 2**bits)
    assert limits(dtype(target))[0] <= got.min() <= got.max() <= limits(dtype(target))[1]


@pytest.mark.parametrize("source", FLOATS)
def test_what_is_not_zero_is_true(source: str) -> None:
    x = cast(floats(0, -0.0, 0.5, -2), source)
    np.testing.assert_array_equal(cast(x, "bool"), [False, False, True, True])


@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", FLOAT8)
def test_float8_saturates(target: str, source: str) -> None:
    most = float_max(dtype(target))
    x = cast(floats(6e4, -6e4, INF, -INF, NAN, 1, 0), source)
    want = [min(most, float(x[0])), -min(most, float(x[0])), most, -most, NAN, 1, 0]
    np.testing.assert_array_equal(cast(x, target).astype(np.float32), cast(floats(*want), target).astype(np.float32))


@pytest.mark.parametrize("target", FLOAT8)
def test_float8_without_saturation_overflows_to_infinity_or_nan(target: str) -> None:
    beyond = INF if target == "float8_e5m2" else NAN
    got = cast(floats(1e6, -1e6, INF, -INF, NAN, 1), target, saturate=0).astype(np.float32)
    np.testing.assert_array_equal(got, [beyond, -beyond, beyond, -beyond, NAN, 1])


@pytest.mark.parametrize("target", ["float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_one_zero_only(target: str) -> None:
    assert not np.signbit(cast(floats(-0.0, -1e-9), target).astype(np.float32)).any()


def test_float8_ties_go_to_even() -> None:
    x = floats(1 + 1 / 16, 1 + 3 / 16, -1 - 1 / 16)  # the step after 1 is 1/8
    np.testing.assert_array_equal(cast(x, "float8_e4m3fn").astype(np.float32), [1, 1.25, -1])


def test_float4_saturates_and_rounds_ties_to_even() -> None:
    x = floats(5, 2.5, 0.25, 0.75, -7, INF, -INF, 3.4)
    np.testing.assert_array_equal(cast(x, "float4_e2m1fn").astype(np.float32), [4, 2, 0, 1, -6, 6, -6, 3])


LEAST, MOST = 2.0**-127, 2.0**127


@pytest.mark.parametrize(
    ("mode", "want"),
    [
        ("up", [1, 2, 2, 2, 2, 4, 0.125, LEAST, MOST]),
        ("down", [1, 1, 1, 1, 2, 2, 0.0625, LEAST, MOST]),
        ("nearest", [1, 1, 2, 2, 2, 4, 0.125, LEAST, MOST]),
    ],
)
def test_powers_of_two_are_rounded_by_mode(mode: str, want: list[float]) -> None:
    x = floats(1, 1.4, 1.5, 1.9, 2, 3.5, 0.124, LEAST, MOST)
    np.testing.assert_array_equal(cast(x, "float8_e8m0fnu", round_mode=mode).astype(np.float32), want)


def test_powers_of_two_saturate_or_become_nan() -> None:
    x = np.array([0, 2.0**-130, 1.7 * MOST, 2.0**130, INF, NAN, 1])
    np.testing.assert_array_equal(
        cast(x, "float8_e8m0fnu").astype(np.float32), floats(LEAST, LEAST, MOST, MOST, MOST, NAN, 1)
    )
    np.testing.assert_array_equal(
        cast(x, "float8_e8m0fnu", saturate=0, round_mode="nearest").astype(np.float32),
        floats(NAN, NAN, NAN, NAN, NAN, NAN, 1),
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "uint32"), ("float16", "bfloat16"), ("int8", "float8_e5m2"), ("uint4", "int4"), ("int2", "uint2")],
)
def test_bits_stay(source: str, target: str) -> None:
    x = cast(np.arange(-2, 2, dtype=np.int64), source)
    there = find("BitCast")(Call(np, {}, (TensorType(dtype(target), x.shape),), {}), x)
    assert there.dtype == dtype(target)
    assert there.tobytes() == x.tobytes()
    back = find("BitCast")(Call(np, {}, (TensorType(dtype(source), x.shape),), {}), there)
    np.testing.assert_array_equal(back.astype(np.float32), x.astype(np.float32))


def test_dtypes_by_name() -> None:
    assert [name for name in ALL if is_for_hosts(dtype(name))] == [
        *FLOAT8, "float4_e2m1fn", "int2", "int4", "uint2", "uint4", "float8_e8m0fnu",
    ]  # fmt: skip
    assert [name for name in ALL if is_small_integer(dtype(name))] == ["int2", "int4", "uint2", "uint4"]
    assert [name for name in ALL if is_narrow(dtype(name))] == [*FLOATS[2:], "float8_e8m0fnu"]
    assert [ort_type(n) for n in ("float32", "uint4", "float8_e8m0fnu", "float8_e5m2fnuz", "float4_e2m1fn")] == [
        "tensor(float)", "tensor(uint4)", "tensor(float8e8m0)", "tensor(float8e5m2fnuz)", "tensor(float4e2m1)",
    ]  # fmt: skip
