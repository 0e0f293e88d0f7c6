"""Quantised ops in normal form against ONNX Runtime, and what it cannot do against their formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from evaluate import evaluate
from onnx import TensorProto, helper

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.compiler.frontend import load
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.normalise.normalise import normalise
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

RNG = np.random.default_rng(0)


def f(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def u8(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def i8(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


def scale(*shape: int, times: float = 1) -> np.ndarray:
    return np.asarray(RNG.uniform(0.01, 0.1, shape) * times, np.float32)


def zero(value: int, kind: Any = np.uint8) -> np.ndarray:
    return np.array(value, kind)


@dataclass(frozen=True)
class Case:
    """One node of ONNX."""

    op: str
    inputs: list[np.ndarray | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1

    def __str__(self) -> str:
        shapes = " ".join("-" if x is None else f"{x.dtype}{list(x.shape)}" for x in self.inputs)
        return f"{self.op} {shapes} {dict(self.attributes)}"

    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(self.inputs)]
        given = [(n, x) for n, x in zip(names, self.inputs) if x is not None]
        kinds = [(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given]
        outputs = [f"y{i}" for i in range(self.outputs)]
        graph = helper.make_graph(
            [helper.make_node(self.op, names, outputs, **self.attributes)],
            "g",
            [helper.make_tensor_value_info(*kind) for kind in kinds],
            [],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        model.graph.output.extend(onnx.shape_inference.infer_shapes(model).graph.value_info)
        return model

    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{i}": x for i, x in enumerate(self.inputs) if x is not None}


X = f(4, 6) * 10
SCALES = [scale(), zero(7)]
BIAS = np.arange(4, dtype=np.int32) * 999
CASES = [
    Case("QuantizeLinear", [X, scale()]),
    Case("QuantizeLinear", [X, scale(), zero(100)]),
    Case("QuantizeLinear", [X, scale(6), i8(6)], {"axis": -1}),
    Case("QuantizeLinear", [X, scale(4), zero(0, np.int16).repeat(4)], {"axis": 0}),
    Case("QuantizeLinear", [X, scale(4, 3)], {"axis": 1, "block_size": 2}),
    Case("QuantizeLinear", [X, scale(2, 6), i8(2, 6)], {"axis": 0, "block_size": 2}),
    Case("QuantizeLinear", [X, scale()], {"output_dtype": TensorProto.UINT16}),
    Case("DequantizeLinear", [u8(4, 6), scale(), zero(255)]),
    Case("DequantizeLinear", [i8(4, 6), scale(6), i8(6)]),
    Case("DequantizeLinear", [u8(4, 6), scale(4, 3), u8(4, 3)], {"axis": 1, "block_size": 2}),
    Case("DequantizeLinear", [u8(4, 5), scale(4, 3)], {"axis": 1, "block_size": 2}),
    Case("DequantizeLinear", [np.arange(-3, 3, dtype=np.int32) * 10**8, scale()]),
    Case("DynamicQuantizeLinear", [f(3, 5) + 2], outputs=3),
    Case("DynamicQuantizeLinear", [f(3, 5) - 9], outputs=3),
    Case("DynamicQuantizeLinear", [np.zeros((2, 3), np.float32)], outputs=3),
    Case("MatMulInteger", [u8(3, 700), i8(700, 5), zero(255), zero(-128, np.int8)]),
    Case("MatMulInteger", [u8(2, 3, 8), u8(8, 5), zero(9), u8(5)]),
    Case("MatMulInteger", [u8(3, 8), u8(2, 8, 5), zero(9), u8(2, 1, 5)]),
    Case("ConvInteger", [u8(2, 3, 7, 7), u8(4, 3, 3, 3), zero(77), zero(3)], {"pads": [1, 1, 0, 1], "strides": [2, 1]}),
    Case("ConvInteger", [u8(2, 4, 9), u8(4, 1, 3)], {"group": 4, "dilations": [2]}),
    Case("QLinearMatMul", [u8(3, 8), *SCALES, i8(8, 5), scale(), zero(-3, np.int8), scale(times=90), zero(99)]),
    Case("QLinearMatMul", [u8(2, 3, 8), *SCALES, i8(8, 5), scale(5), i8(5), scale(times=90), zero(99)]),
    Case("QLinearConv", [u8(2, 3, 6, 6), *SCALES, i8(4, 3, 3, 3), scale(4), i8(4) * 0, scale(times=90), zero(9)]),
    Case(
        "QLinearConv",
        [u8(1, 4, 6, 6), *SCALES, u8(4, 2, 3, 3), scale(), zero(128), scale(times=90), zero(9), BIAS],
        {"group": 2, "pads": [1, 1, 1, 1]},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_numbers_as_onnxruntime(case: Case) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = case.model().SerializeToString()
    expected = onnxruntime.InferenceSession(model, options).run(None, case.feeds())
    found = evaluate(normalise(bind(load(case.model()), {}, {})), case.feeds())
    for i, wanted in enumerate(expected):
        assert found[f"y{i}"].dtype == wanted.dtype
        np.testing.assert_allclose(found[f"y{i}"], wanted, rtol=1e-6)


def launch(op: str, kind: str, *inputs: np.ndarray, shape: tuple[int, ...] = (), **attrs: Any) -> np.ndarray:
    return find(op)(Call(np, attrs, (TensorType(dtype(kind), shape or inputs[0].shape),), {}), *inputs)


def test_the_quotient_has_the_precision_of_the_scale_or_the_one_asked_for() -> None:
    x, by = np.array([2049.0], np.float32), np.array(2.0)  # 1024.5 is no float16: it is rounded to 1024 there
    assert launch("QuantizeLinear", "int16", x, by.astype(np.float32)) == [1024]
    x = np.array([2051.0], np.float32)  # 1025.5: 1026 by the rule, and in float16
    assert launch("QuantizeLinear", "int16", x, by.astype(np.float16)) == [1026]
    x, by = np.array([1000.3], np.float32), np.array(0.5, np.float32)  # 2000.6; a step of bfloat16 is 8 there
    assert launch("QuantizeLinear", "int16", x, by) == [2001]
    assert launch("QuantizeLinear", "int16", x, by, precision="bfloat16") == [2000]
    assert launch("QuantizeLinear", "int16", x, by.astype(dtype("bfloat16"))) == [2000]


@pytest.mark.parametrize(("kind", "want"), [("int4", [-8, 7, 1]), ("uint4", [0, 15, 1]), ("int2", [-2, 1, 1])])
def test_small_integers_saturate(kind: str, want: list[int]) -> None:
    x = np.array([-100, 100, 0.6], np.float32)
    got = launch("QuantizeLinear", kind, x, np.array(1, np.float32), np.zeros((), dtype(kind)))
    np.testing.assert_array_equal(got.astype(np.int8), want)


def test_floats_of_8_and_4_bits_saturate_on_request() -> None:
    x, one = np.array([1e4, -1e4, 1.1], np.float32), np.array(1, np.float32)
    got = launch("QuantizeLinear", "float8_e4m3fn", x, one).astype(np.float32)
    np.testing.assert_array_equal(got, np.array([448, -448, 1.125], np.float32))
    got = launch("QuantizeLinear", "float8_e4m3fn", x, one, saturate=0).astype(np.float32)
    np.testing.assert_array_equal(got, np.array([np.nan, np.nan, 1.125], np.float32))
    got = launch("QuantizeLinear", "float4_e2m1fn", x, one).astype(np.float32)
    np.testing.assert_array_equal(got, np.array([6, -6, 1], np.float32))


def test_a_scale_that_is_a_power_of_two_is_applied_as_it_is() -> None:
    x = np.array([1.5, -3, 6], dtype("float4_e2m1fn"))
    by = np.array([0.25], dtype("float8_e8m0fnu"))
    np.testing.assert_array_equal(launch("DequantizeLinear", "float32", x, by), [0.375, -0.75, 1.5])
    back = launch("QuantizeLinear", "float4_e2m1fn", np.array([0.375, -0.75, 1.5], np.float32), by)
    np.testing.assert_array_equal(back.astype(np.float32), [1.5, -3, 6])


def test_rows_have_zero_points_of_their_own() -> None:
    a, b, zeros = u8(4, 12), i8(12, 6), u8(4)
    want = (a.astype(np.int32) - zeros[:, None]) @ b.astype(np.int32)
    np.testing.assert_array_equal(launch("MatMulInteger", "int32", a, b, zeros, shape=(4, 6)), want)


def test_sums_beyond_32_bits_wrap_around() -> None:
    a, b = np.full((1, 70000), 255, np.uint8), np.full((70000, 1), 255, np.uint8)
    want = np.array([[255 * 255 * 70000 - 2**32]], np.int64)
    np.testing.assert_array_equal(launch("MatMulInteger", "int32", a, b, shape=(1, 1)), want)


@pytest.mark.parametrize(("bits", "want"), [(4, [1, 2, 15, 0]), (2, [1, 0, 2, 0, 3, 3, 0, 0]), (8, [0x21, 0x0F])])
def test_bits_are_unpacked_from_the_lowest(bits: int, want: list[int]) -> None:
    x = np.array([[0x21, 0x0F]], np.uint8)
    got = launch("UnpackBits", "uint8", x, shape=(1, len(want)), bits=bits)
    np.testing.assert_array_equal(got, [want])
