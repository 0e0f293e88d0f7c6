"""Quantised ops of com.microsoft give in normal form what ONNX Runtime gives; integers may differ by one."""

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

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.frontend import load
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.normalise.normalise import normalise

RNG = np.random.default_rng(0)
FLOAT, U8, I8 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def u8(*shape: int, below: int = 256) -> np.ndarray:
    return np.asarray(RNG.integers(0, below, shape), np.uint8)


def i8(*shape: int) -> np.ndarray:
    return np.asarray(RNG.integers(-128, 128, shape), np.int8)


def scale(*shape: int, times: float = 1.0) -> np.ndarray:
    return np.asarray(RNG.uniform(0.01, 0.1, shape) * times, np.float32)


def zero(value: int, kind: Any = np.uint8) -> np.ndarray:
    return np.array(value, kind)


@dataclass(frozen=True)
class Case:
    """One node; inputs whose indices are in `known` are initialisers."""

    op: str
    inputs: list[np.ndarray | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    out: int = U8
    known: tuple[int, ...] = ()

    def __str__(self) -> str:
        shapes = " ".join("-" if x is None else f"{x.dtype}{list(x.shape)}" for x in self.inputs)
        return f"{self.op} {shapes} {dict(self.attributes)}"

    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(self.inputs)]
        given = [(i, n, x) for i, (n, x) in enumerate(zip(names, self.inputs)) if x is not None]
        graph = helper.make_graph(
            [helper.make_node(self.op, names, ["y"], domain="com.microsoft", name="n", **self.attributes)],
            "g",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                for i, n, x in given
                if i not in self.known
            ],
            [helper.make_tensor_value_info("y", self.out, None)],
            [onnx.numpy_helper.from_array(x, n) for i, n, x in given if i in self.known],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{i}": x for i, x in enumerate(self.inputs) if x is not None and i not in self.known}


A, AZ = [u8(3, 4), scale(), zero(120)], [i8(3, 4), scale(), zero(-3, np.int8)]
Y, YZ = [scale(times=3), zero(99)], [scale(times=3), zero(5, np.int8)]
IMAGE = [u8(2, 4, 6, 6), scale(), zero(120)]
LAST = [u8(2, 6, 6, 4), scale(), zero(120)]
PROBABILITY = [np.array(1 / 256, np.float32), zero(0)]
WINDOW = {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1], "strides": [2, 1]}
PRODUCT = [u8(3, 8), scale(), zero(9), i8(8, 5), scale(), zero(-2, np.int8)]
B, S, H, D = 2, 5, 4, 8
WIDTH = H * D
QKV = [u8(B, S, WIDTH), i8(WIDTH, 3 * WIDTH), f(3 * WIDTH), np.float32([0.02]), np.float32([0.01])]
PADDING = np.array([[1, 1, 1, 0, 0], [1] * 5], np.int32)


def nbits(bits: int, k: int, n: int, block: int, zeros: str = "", *more: np.ndarray | None, **attributes: Any) -> Case:
    """MatMulNBits over a [2, 3, k] input."""
    blocks = -(-k // block)
    points = {
        "": None,
        "packed": u8(n * -(-blocks * bits // 8)),
        "float": np.abs(f(n * blocks)) * 4,
    }[zeros]
    inputs = [f(2, 3, k), u8(n, blocks, block * bits // 8), scale(n * blocks), points, *more]
    sizes = {"K": k, "N": n, "bits": bits, "block_size": block, **attributes}
    return Case("MatMulNBits", inputs, sizes, FLOAT, (1, 2, 3, 4))


CASES = [
    Case("QLinearAdd", [*A, *A[:1], scale(), zero(7), *Y]),
    Case("QLinearAdd", [*AZ, i8(4), scale(), zero(7, np.int8), *YZ], out=I8),
    Case("QLinearMul", [*A, u8(3, 1), scale(), zero(7), *Y]),
    Case("QLinearMul", [*AZ, i8(3, 4), scale(), zero(7, np.int8), *YZ], out=I8),
    Case("QLinearSigmoid", [*A, *PROBABILITY], known=(1, 2, 3, 4)),
    Case("QLinearLeakyRelu", [*A, *Y], {"alpha": 0.2}, known=(1, 2, 3, 4)),
    Case("QLinearWhere", [RNG.random((3, 4)) < 0.5, *A, u8(3, 4), scale(), zero(8), *Y]),
    Case("QLinearConcat", [*Y, *A, u8(3, 2), scale(), zero(7)], {"axis": 1}),
    Case("QLinearSoftmax", [*A, *PROBABILITY], {"opset": 13, "axis": -1}, known=(1, 2, 3, 4)),
    Case("QLinearSoftmax", [*IMAGE, *PROBABILITY], {"opset": 12, "axis": 2}, known=(1, 2, 3, 4)),
    Case("QLinearAveragePool", [*IMAGE, *Y], WINDOW),
    Case("QLinearAveragePool", [*LAST, *Y], {**WINDOW, "channels_last": 1, "count_include_pad": 1}),
    Case("QLinearGlobalAveragePool", [*IMAGE, *Y]),
    Case("QLinearGlobalAveragePool", [*LAST, *Y], {"channels_last": 1}),
    Case("QLinearConv", [*LAST, u8(3, 4, 3, 3), scale(), zero(9), *Y], {"channels_last": 1}, known=tuple(range(1, 8))),
    Case("QGemm", [*PRODUCT, RNG.integers(-99, 99, 5).astype(np.int32), *Y], {"alpha": 0.5}),
    Case("QGemm", [u8(8, 3), *PRODUCT[1:3], i8(5, 8), scale(5), i8(5)], {"transA": 1, "transB": 1}, FLOAT),
    Case("MatMulIntegerToFloat", [u8(3, 8), i8(8, 5), scale(), scale(5), zero(9), i8(5), f(5)], out=FLOAT),
    Case("MatMulIntegerToFloat", [u8(2, 3, 8), u8(8, 5), scale(), scale()], out=FLOAT),
    Case("DynamicQuantizeMatMul", [f(2, 3, 8), i8(8, 5), scale(5), i8(5), f(5)], out=FLOAT),
    Case("DynamicQuantizeMatMul", [f(3, 8), u8(8, 5), scale()], out=FLOAT),
    Case("MatMulInteger16", [i8(3, 8).astype(np.int16) * 256, i8(8, 5).astype(np.int16)], out=TensorProto.INT32),
    Case("QAttention", [*QKV, None, zero(120), zero(3, np.int8)], {"num_heads": H}, FLOAT),
    Case("QAttention", [*QKV, PADDING, zero(120)], {"num_heads": H, "unidirectional": 1}, FLOAT),
    Case("QuantizeLinear", [f(3, 4), scale(times=0.001), zero(1000, np.uint16)], out=TensorProto.UINT16),
    Case("QuantizeLinear", [f(3, 4), scale(4), i8(4)], {"axis": 1}, I8),
    Case("DequantizeLinear", [i8(3, 4).astype(np.int16) * 9, scale(3), i8(3).astype(np.int16)], {"axis": 0}, FLOAT),
    nbits(4, 32, 6, 16),
    nbits(4, 32, 6, 16, "packed"),
    nbits(4, 40, 6, 16, "packed"),
    nbits(4, 64, 6, 32, "float"),
    nbits(8, 32, 6, 16, "packed"),
    nbits(2, 64, 6, 16, "packed"),
    nbits(4, 32, 6, 16, "packed", None, f(6)),
    nbits(4, 32, 6, 16, "", RNG.permutation(np.arange(32, dtype=np.int32) // 16)),
    Case("GatherBlockQuantized", [u8(9, 16), np.array([[3, 8]]), scale(9, 2)], {"block_size": 16}, FLOAT, (0, 2)),
    Case(
        "GatherBlockQuantized",
        [u8(9, 24), np.array([3, -1]), scale(9, 3), u8(9, 2)],
        {"block_size": 16, "bits": 4, "quantize_axis": -1},
        FLOAT,
        (0, 2, 3),
    ),
]  # fmt: skip


def normal_form(case: Case):
    return normalise(bind(load(case.model()), {}, {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_numbers_as_onnxruntime(case: Case) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (wanted,) = onnxruntime.InferenceSession(case.model().SerializeToString(), options).run(None, case.feeds())
    found = evaluate(normal_form(case), case.feeds())["y"]
    assert found.dtype == wanted.dtype
    if wanted.dtype == np.float32:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_allclose(found.astype(int), wanted.astype(int), rtol=0, atol=1)
        assert (found == wanted).mean() > 0.9
    assert len(np.unique(wanted)) > 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_of_microsoft_stays(case: Case) -> None:
    assert {node.domain for node in normal_form(case).graph} <= {"", "onnxmesh"}


def test_a_weight_for_one_device_is_refused() -> None:
    with pytest.raises(ModelError, match=r"node 'n' \(com.microsoft::MatMulNBits\)"):
        normal_form(nbits(4, 32, 6, 16, weight_prepacked=1))
