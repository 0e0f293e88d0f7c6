"""Kernels against ONNX Runtime's, or the ONNX reference's where that has none, on single-node models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

RNG = np.random.default_rng(7)
OPSET = 24


def f(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def ints(*shape: int, low: int = -9, high: int = 9, dtype: Any = np.int64) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(dtype)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def bools(*shape: int) -> np.ndarray:
    return RNG.random(shape) < 0.5


@dataclass
class Case:
    """An op with its ONNX inputs. In normal form `drop` of them, from the second on, are attributes `attrs`."""

    op: str
    inputs: Sequence[np.ndarray | None]
    onnx_attrs: Mapping[str, Any] = field(default_factory=dict)
    drop: int = 0
    attrs: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    kernel: str = ""
    reference: bool = False
    opset: int = OPSET

    def __str__(self) -> str:
        dtype = next(x.dtype.name for x in self.inputs if x is not None)
        return f"{self.op}-{dtype}-{'-'.join(f'{k}={v}' for k, v in self.onnx_attrs.items())}"[:60]


def expected(case: Case) -> list[np.ndarray]:
    names = ["" if x is None else f"x{i}" for i, x in enumerate(case.inputs)]
    outs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outs, **case.onnx_attrs)
    given = {n: x for n, x in zip(names, case.inputs) if x is not None}
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given.items()
    ]
    empty = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in outs]
    graph = helper.make_graph([node], "g", infos, [], [])
    inferred = onnx.shape_inference.infer_shapes(
        helper.make_model(
            helper.make_graph([node], "g", infos, empty), opset_imports=[helper.make_opsetid("", case.opset)]
        )
    )
    graph.output.extend(inferred.graph.output)
    for out in graph.output:
        if not out.type.tensor_type.elem_type:
            out.type.tensor_type.elem_type = infos[0].type.tensor_type.elem_type
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10)
    if not case.reference:
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x) for n, x in given.items()}
            return [v.numpy() for v in session.run_with_ort_values(None, values)]
        except Exception as error:
            if "NOT_IMPLEMENTED" not in str(error) and "not implemented" not in str(error).lower():
                raise
    return ReferenceEvaluator(model).run(None, given)


def run_kernel(case: Case, outs: Sequence[TensorType]) -> list[np.ndarray]:
    """The kernel's results; it gets read-only inputs, so that it cannot write to them."""
    inputs = [None if x is None else x.view() for x in case.inputs]
    inputs = inputs[: 1 if case.drop else None] + (inputs[1 + case.drop :] if case.drop else [])
    for x in inputs:
        if x is not None:
            x.flags.writeable = False
    call = Call(np, {**case.onnx_attrs, **case.attrs}, tuple(outs), {})
    with np.errstate(all="ignore"):
        result = find(case.kernel or case.op)(call, *inputs)
    return list(result) if isinstance(result, tuple) else [result]


def check(case: Case, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    want = [np.asarray(x) for x in expected(case)]
    got = run_kernel(case, [TensorType(x.dtype, x.shape) for x in want])
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if b.dtype.kind in "biu":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol, atol)


SPECIAL = np.array([0.0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, 30, -30, np.inf, -np.inf, np.nan], np.float32)
UNARY = """Abs Neg Exp Floor Ceil Round Sign Sin Cos Tan Atan Sinh Cosh Tanh Asinh Erf Sigmoid Relu Gelu
Softplus Mish Softsign HardSigmoid HardSwish LeakyRelu Elu Celu Selu ThresholdedRelu Reciprocal IsNaN IsInf
Shrink Identity""".split()
POSITIVE = "Log Sqrt Asin Acos Acosh Atanh".split()

ELEMENTWISE = [
    *(Case(op, [f(3, 4) * 2]) for op in UNARY),
    *(Case(op, [SPECIAL]) for op in "Abs Neg Floor Ceil Round Tanh Erf Sigmoid Relu IsNaN IsInf".split()),
    *(Case(op, [np.abs(f(3, 4)) / 4 + (1.0 if op == "Acosh" else 0.1)]) for op in POSITIVE),
    Case("Gelu", [f(5, 6)], {"approximate": "tanh"}),
    Case("Swish", [f(5, 6)], {"alpha": 1.5}, reference=True),
    Case("IsInf", [SPECIAL], {"detect_negative": 0}),
    Case("PRelu", [f(3, 4), f(4)]),
    Case("Selu", [f(9)], {"alpha": 1.2, "gamma": 0.7}),
    *(Case(op, [f(3, 1, 4), f(2, 1)]) for op in "Add Sub Mul Div Less Greater LessOrEqual GreaterOrEqual".split()),
    *(Case(op, [ints(3, 4), ints(4) | 1]) for op in "Add Sub Mul Div Mod Equal Less".split()),
    Case("Mod", [f(9) * 5, f(9)], {"fmod": 1}),
    Case("Mod", [ints(9), ints(9) | 1], {"fmod": 1}),
    *(Case(op, [bools(3, 4), bools(4)]) for op in "And Or Xor Equal".split()),
    Case("Not", [bools(5)]),
    *(Case(op, [ints(6, dtype=np.int32), ints(6, dtype=np.int32)]) for op in "BitwiseAnd BitwiseOr BitwiseXor".split()),
    Case("BitwiseNot", [ints(6, dtype=np.int32)]),
    *(
        Case(
            "BitShift",
            [ints(6, low=0, high=99, dtype=np.uint8), ints(6, low=0, high=4, dtype=np.uint8)],
            {"direction": d},
        )
        for d in ("LEFT", "RIGHT")
    ),
    Case("Pow", [np.abs(f(3, 4)), f(4)]),
    Case("Pow", [f(3, 4), np.array(2, np.float32)]),
    Case("Pow", [f(3, 4), np.array([3], np.int64)]),
    Case("Pow", [ints(3, 4), np.array([2], np.float32)]),
    Case("Pow", [ints(4, dtype=np.int32), ints(4, low=0, high=5, dtype=np.int32)]),
    Case("Where", [bools(3, 1), f(3, 4), f(4)]),
    *(Case(op, [f(3, 4), f(4), f(1)]) for op in "Sum Mean Max Min".split()),
    Case("Max", [ints(3, 4), ints(4)]),
    Case("Clip", [f(9), np.array(-0.5, np.float32), np.array(0.5, np.float32)]),
    Case("Clip", [f(9), None, np.array(0.5, np.float32)]),
    *(Case(op, [f(7, dtype=np.float16), f(7, dtype=np.float16)]) for op in "Add Mul Div".split()),
    *(Case(op, [f(7, dtype=ml_dtypes.bfloat16)], reference=True) for op in "Exp Neg Sqrt".split()[:2]),
]

CASTS = [
    (np.float32, TensorProto.INT64), (np.float32, TensorProto.BOOL), (np.float32, TensorProto.FLOAT16),
    (np.float32, TensorProto.BFLOAT16), (np.int64, TensorProto.FLOAT), (bool, TensorProto.FLOAT),
    (np.float32, TensorProto.FLOAT8E4M3FN), (np.float32, TensorProto.FLOAT8E5M2),
    (np.float16, TensorProto.FLOAT), (np.float64, TensorProto.FLOAT), (np.int32, TensorProto.UINT8),
]  # fmt: skip

VIEWS = [
    Case("Reshape", [f(2, 6), i64(3, -1)], drop=1),
    Case("Flatten", [f(2, 3, 4)], {"axis": 2}, kernel="Reshape"),
    Case("Expand", [f(3, 1), i64(2, 3, 4)], drop=1),
    Case("Transpose", [f(2, 3, 4)], {"perm": [2, 0, 1]}),
    Case("Transpose", [f(2, 3, 4)]),
    Case("Slice", [f(5, 6), i64(1), i64(5), i64(0), i64(2)], drop=4,
         attrs={"axes": [0], "starts": [1], "steps": [2]}),
    Case("Slice", [f(5, 6), i64(4, 1), i64(-9, 4), i64(0, 1), i64(-2, 1)], drop=4,
         attrs={"axes": [0, 1], "starts": [4, 1], "steps": [-2, 1]}),
    Case("Slice", [f(5), i64(3), i64(2), i64(0), i64(1)], drop=4, attrs={"axes": [0], "starts": [3], "steps": [1]}),
    Case("Split", [f(2, 7), i64(3, 4)], {"axis": 1}, drop=1, outputs=2),
    Case("Concat", [f(2, 3), f(2, 1)], {"axis": -1}),
    Case("Pad", [f(2, 3), i64(1, 0, 2, 3)], drop=1, attrs={"pads": [1, 0, 2, 3]}),
    Case("Pad", [f(3, 4), i64(0, 1, -1, 0), np.array(7, np.float32)], drop=1, attrs={"pads": [0, 1, -1, 0]}),
    *(Case("Pad", [f(4, 5), i64(1, 2, 2, 1)], {"mode": mode}, drop=1, attrs={"pads": [1, 2, 2, 1]})
      for mode in ("reflect", "edge", "wrap")),
    Case("Tile", [f(2, 3), i64(2, 3)], drop=1, attrs={"repeats": [2, 3]}),
    Case("Trilu", [f(3, 4), np.array(1, np.int64)], {"upper": 1}, drop=1, attrs={"k": 1}),
    Case("Trilu", [ints(2, 3, 4), np.array(-1, np.int64)], {"upper": 0}, drop=1, attrs={"k": -1}),
    *(Case("DepthToSpace", [f(1, 8, 2, 3)], {"blocksize": 2, "mode": m}) for m in ("DCR", "CRD")),
    Case("SpaceToDepth", [f(1, 2, 4, 6)], {"blocksize": 2}),
]  # fmt: skip

CONTRACTIONS = [
    Case("MatMul", [f(2, 3, 4), f(4, 5)]),
    Case("MatMul", [f(2, 1, 3, 4), f(3, 4, 5)]),
    Case("MatMul", [f(4), f(4, 5)]),
    Case("MatMul", [ints(3, 4, dtype=np.int32), ints(4, 5, dtype=np.int32)]),
    Case("Einsum", [f(2, 3, 4), f(2, 4, 5)], {"equation": "bij, bjk -> bik"}),
    Case("Einsum", [f(2, 3, 4), f(5, 4)], {"equation": "...i,ji->...j"}),
    Case("Conv", [f(2, 3, 9), f(4, 3, 3), f(4)], {"pads": [1, 1], "strides": [2]}),
    Case("Conv", [f(2, 4, 7, 8), f(6, 2, 3, 2)], {"group": 2, "dilations": [2, 1], "pads": [2, 0, 1, 1]}),
    Case("Conv", [f(1, 3, 8, 8), f(5, 3, 4, 4), f(5)], {"strides": [4, 4]}),
    Case("Conv", [f(1, 2, 4, 5, 6), f(3, 2, 2, 3, 2)], {"strides": [1, 2, 1]}),
    Case("Conv", [f(1, 3, 7, 7), f(3, 1, 3, 3)], {"group": 3, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", [f(1, 3, 7, 7), f(3, 3, 2, 2)], {"auto_pad": "SAME_LOWER"}),
    Case("ConvTranspose", [f(2, 4, 5), f(4, 3, 3), f(3)], {"strides": [2], "pads": [1, 0]}),
    Case("ConvTranspose", [f(1, 4, 3, 4), f(4, 2, 3, 3)],
         {"strides": [2, 3], "output_padding": [1, 2], "group": 2, "dilations": [1, 2]}),
    Case("ConvTranspose", [f(1, 2, 3, 3), f(2, 2, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("MaxPool", [f(1, 2, 7, 8)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    Case("MaxPool", [f(1, 2, 8, 8)], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    Case("AveragePool", [f(1, 2, 7, 8)], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]}),
    Case("AveragePool", [f(1, 2, 7)], {"kernel_shape": [3], "pads": [1, 1], "count_include_pad": 1}),
    Case("GlobalAveragePool", [f(2, 3, 4, 5)]),
    Case("GlobalMaxPool", [f(2, 3, 4, 5)]),
]  # fmt: skip

NORMS = [
    Case("LayerNormalization", [f(2, 3, 8), f(8), f(8)]),
    Case("LayerNormalization", [f(2, 3, 8), f(3, 8)], {"axis": 1, "epsilon": 1e-3}),
    Case("LayerNormalization", [f(2, 3, 8), f(8), f(8)], outputs=3),
    Case("RMSNormalization", [f(2, 3, 8), f(8)], {"epsilon": 1e-6}),
    *(Case(op, [f(2, 3, 8) * 9], {"axis": axis}) for op in ("Softmax", "LogSoftmax") for axis in (-1, 1)),
    Case("GroupNormalization", [f(2, 6, 4, 3), f(6), f(6)], {"num_groups": 3}),
    Case("InstanceNormalization", [f(2, 6, 4, 3), f(6), f(6)]),
    Case("BatchNormalization", [f(2, 6, 4), f(6), f(6), f(6), np.abs(f(6))]),
    *(Case("LpNormalization", [f(2, 6)], {"p": p, "axis": 0}) for p in (1, 2)),
    Case("Hardmax", [f(2, 6)]),
    Case("MeanVarianceNormalization", [f(2, 3, 4, 5)]),
]

REDUCTIONS = [
    *(Case(f"Reduce{name}", [np.abs(f(2, 3, 4)), i64(0, 2)], {"keepdims": keep}, drop=1, attrs={"axes": [0, 2]})
      for name in "Sum Mean Max Min Prod L1 L2 LogSum LogSumExp SumSquare".split() for keep in (0, 1)),
    *(Case(f"Reduce{name}", [ints(3, 4), i64(1)], drop=1, attrs={"axes": [1]}) for name in "Sum Max Prod".split()),
    Case("ReduceLogSumExp", [np.full((2, 3), -np.inf, np.float32), i64(1)], drop=1, attrs={"axes": [1]}),
    *(Case(op, [ints(4, 9, high=0, dtype=np.float32)], {"axis": 1, "keepdims": keep, "select_last_index": last})
      for op in ("ArgMax", "ArgMin") for keep in (0, 1) for last in (0, 1)),
    *(Case("CumSum", [f(3, 4), np.array(1, np.int64)], {"exclusive": e, "reverse": r}, drop=1, attrs={"axis": 1})
      for e in (0, 1) for r in (0, 1)),
    Case("CumSum", [ints(5, dtype=np.int32), np.array(0, np.int64)], drop=1, attrs={"axis": 0}),
    *(Case("TopK", [ints(3, 9).astype(np.float32), i64(4)], {"largest": largest}, drop=1, attrs={"k": 4}, outputs=2)
      for largest in (0, 1)),
    Case("TopK", [ints(9, 3), i64(2)], {"axis": 0}, drop=1, attrs={"k": 2}, outputs=2),
]  # fmt: skip

INDEXING = [
    Case("Gather", [f(5, 4), ints(2, 3, low=-5, high=5)]),
    Case("Gather", [f(5, 4), np.array(-1, np.int64)], {"axis": 1}),
    Case("GatherElements", [f(5, 4), ints(2, 3, low=-5, high=5)]),
    Case("GatherElements", [f(5, 4), ints(4, 2, low=-4, high=4, dtype=np.int32)], {"axis": 1}),
    Case("GatherND", [f(5, 4, 3), ints(2, 6, 2, low=-4, high=4)]),
    Case("GatherND", [f(2, 4, 3), ints(2, 6, 1, low=-4, high=4)], {"batch_dims": 1}),
    Case("GatherND", [f(2, 3, 4, 5), ints(2, 3, 2, low=0, high=4)], {"batch_dims": 2}),
    Case("ScatterND", [f(5, 4, 3), i64(1, 0, -1, 2).reshape(2, 2), f(2, 3)]),
    *(Case("ScatterND", [f(5, 4), ints(9, 1, low=0, high=5), f(9, 4)], {"reduction": r})
      for r in ("add", "mul", "max", "min")),
    Case("ScatterElements", [f(5, 4), i64(1, 0, -1, 2).reshape(2, 2), f(2, 2)]),
    *(Case("ScatterElements", [f(5, 4), ints(5, 3, low=-4, high=4), f(5, 3)], {"axis": 1, "reduction": r})
      for r in ("add", "mul", "max", "min")),
    Case("OneHot", [ints(2, 3, low=-4, high=5), np.array(4, np.int64), f(2)]),
    Case("OneHot", [ints(2, 3, low=0, high=4), np.array(4, np.int64), f(2)], {"axis": 1}),
    Case("Compress", [f(3, 4), np.array([1, 0, 1], bool)], {"axis": 0}),
    *(Case("ReverseSequence", [f(4, 3, 2), i64(1, 2, 3)[: (3 if b else 4)] if b else i64(1, 2, 3, 3)],
           {"time_axis": 1 - b, "batch_axis": b}) for b in (0, 1)),
]  # fmt: skip

SCALES = np.array([1, 1, 2, 1.5], np.float32)


def resized(attrs: Mapping[str, Any]) -> Case:
    """Scales are an attribute of the normal form."""
    scales = {"scales": SCALES.tolist()}
    return Case("Resize", [f(1, 2, 4, 6), None, SCALES], attrs, drop=2, attrs={**attrs, **scales})


IMAGES = [
    *(resized({"mode": "nearest", "nearest_mode": rounding, "coordinate_transformation_mode": coordinates})
      for rounding, coordinates in (("floor", "asymmetric"), ("round_prefer_floor", "half_pixel"),
                                    ("round_prefer_ceil", "align_corners"), ("ceil", "asymmetric"))),
    *(resized({"mode": mode, "coordinate_transformation_mode": coordinates})
      for mode in ("linear", "cubic") for coordinates in ("half_pixel", "align_corners", "pytorch_half_pixel")),
    Case("Resize", [f(1, 2, 4, 6), None, None, i64(1, 2, 7, 3)], {"mode": "linear"}, drop=3),
    resized({"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}),
]  # fmt: skip

Q = np.array([0.1, 0.3], np.float32)
QUANTISED = [
    Case("QuantizeLinear", [f(3, 2) * 30, np.array(0.2, np.float32), np.array(3, np.int8)]),
    Case("QuantizeLinear", [f(3, 2) * 9, Q, np.array([128, 100], np.uint8)], {"axis": 1}),
    Case("DequantizeLinear", [ints(3, 2, dtype=np.int8), np.array(0.2, np.float32), np.array(3, np.int8)]),
    Case("DequantizeLinear", [ints(2, 3, 2, dtype=np.int8), Q], {"axis": 0}),
    Case("DequantizeLinear", [ints(4, 2, dtype=np.int8), np.stack([Q, Q * 2])], {"axis": 0, "block_size": 2}),
]

ALL = [*IMAGES, *QUANTISED, *ELEMENTWISE, *VIEWS, *CONTRACTIONS, *NORMS, *REDUCTIONS, *INDEXING]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_kernel_agrees_with_onnx(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("source", "target"), CASTS)
def test_cast(source: Any, target: int) -> None:
    x = np.array([0, 1, -1, 0.3, -2.7, 100, 7.5], np.float32).astype(source)
    x = np.abs(x) if target == TensorProto.UINT8 else x
    check(Case("Cast", [x], {"to": target}, reference=True))


@pytest.mark.parametrize(("saturate", "want"), [(1, [448, -448, 448]), (0, [np.nan] * 3)])
def test_cast_to_float8_saturates_on_request(saturate: int, want: list[float]) -> None:
    x = np.array([1e5, -1e5, np.inf], np.float32)
    out = TensorType(np.dtype(ml_dtypes.float8_e4m3fn), (3,))
    got = find("Cast")(Call(np, {"saturate": saturate}, (out,), {}), x)
    np.testing.assert_array_equal(got.astype(np.float32), np.array(want, np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_narrow_floats_compute_in_float32_and_round_once(dtype: Any) -> None:
    a, b = f(4, 64).astype(dtype), f(64, 3).astype(dtype)
    out = TensorType(np.dtype(dtype), (4, 3))
    got = find("MatMul")(Call(np, {}, (out,), {}), a, b)
    want = (a.astype(np.float32) @ b.astype(np.float32)).astype(dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


def test_a_convolution_unfolds_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxmesh.runtime.kernels.conv._COLUMN_BYTES", 600)
    check(Case("Conv", [f(2, 3, 9, 9), f(4, 3, 3, 3)], {"pads": [1, 1, 1, 1]}))
