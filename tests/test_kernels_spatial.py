"""Ops over spatial dims, as models hold them, against ONNX Runtime, or ONNX's reference where that has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import onnxmesh
from onnxmesh.compiler.errors import ModelError
from onnxmesh.runtime.session import Session

RNG = np.random.default_rng(3)
Attributes = Mapping[str, Any]


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@dataclass
class Case:
    """A node; inputs from `fixed` on are initialisers."""

    op: str
    inputs: Sequence[np.ndarray | None]
    attributes: Attributes = field(default_factory=dict)
    opset: int = 21
    outputs: int = 1
    fixed: int = 9
    reference: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.opset}-{'-'.join(f'{k}={v}' for k, v in self.attributes.items())}"[:70]

    @property
    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(self.inputs)]
        infos, constants = [], []
        for i, (name, x) in enumerate(zip(names, self.inputs)):
            if x is not None and i >= self.fixed:
                constants.append(onnx.numpy_helper.from_array(x, name))
            elif x is not None:
                infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape))
        outs = [f"y{i}" for i in range(self.outputs)]
        kinds = [helper.np_dtype_to_tensor_dtype(self.inputs[0].dtype), TensorProto.INT64]
        kinds = kinds if self.op == "MaxPool" else kinds[:1] * 3
        results = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outs, kinds)]
        graph = helper.make_graph(
            [helper.make_node(self.op, names, outs, **self.attributes)], "g", infos, results, constants
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{i}": x for i, x in enumerate(self.inputs) if x is not None and i < self.fixed}

    def expected(self) -> list[np.ndarray]:
        if self.reference:
            return ReferenceEvaluator(self.model).run(None, self.feeds)
        session = onnxruntime.InferenceSession(self.model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, self.feeds)


IMAGE = f(2, 3, 7, 8)
CROP = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
ROI = np.array([0, 0, 0.2, 0.6, 1, 1, 0.7, 1.3], np.float32)
SCALES = np.array([1, 1, 2, 0.5], np.float32)
ROIS = np.array([[0, 0, 6, 5], [1.4, 2.2, 3.1, 6.9], [5, 5, 5, 5], [-3, -2, 9, 9]], np.float32)
UNPOOLED = np.array([[[[5, 7], [13, 15]], [[16, 18], [24, 31]]]], np.int64)
CASES = [
    *(Case("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "storage_order": order}, outputs=2)
      for order in (0, 1)),
    Case("MaxPool", [f(2, 3, 5, 4, 6)], {"kernel_shape": [2, 2, 3], "strides": [2, 1, 2], "storage_order": 0},
         outputs=2),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [3, 2], "strides": [1, 2], "ceil_mode": 1}),
    Case("MaxPool", [RNG.integers(-99, 99, (1, 2, 6, 6)).astype(np.int8)],
         {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case("MaxUnpool", [f(1, 2, 2, 2), UNPOOLED], {"kernel_shape": [2, 2], "strides": [2, 2]}, reference=True),
    *(Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1,
                                    "count_include_pad": inside}) for inside in (0, 1)),
    Case("LpPool", [IMAGE], {"kernel_shape": [2, 3], "strides": [2, 2], "p": 3, "pads": [0, 1, 1, 1]}),
    Case("GlobalLpPool", [IMAGE], {"p": 3}, opset=18),
    *(Case("RoiAlign", [IMAGE, ROIS, i64(0, 1, 0, 1)],
           {"output_height": 3, "output_width": 2, "sampling_ratio": ratio, "spatial_scale": 0.8, "mode": mode,
            "coordinate_transformation_mode": corner})
      for ratio, mode, corner in ((0, "avg", "half_pixel"), (2, "avg", "output_half_pixel"), (2, "max", "half_pixel"))),
    Case("MaxRoiPool", [IMAGE, np.hstack([np.array([[0], [1], [0], [1]], np.float32), np.abs(ROIS)])],
         {"pooled_shape": [3, 2], "spatial_scale": 0.7}),
    *(Case("Resize", [IMAGE, None, SCALES], {"mode": mode, "antialias": 1}, fixed=2, reference=True)
      for mode in ("linear", "cubic")),
    *(Case("Resize", [IMAGE, ROI, None, i64(2, 3, 5, 4)], attributes, fixed=2)
      for attributes in (CROP, {**CROP, "mode": "nearest"})),
    *(Case("Resize", [IMAGE, None, None, i64(5, 20)],
           {"axes": [2, 3], "keep_aspect_ratio_policy": policy, "mode": "linear"}, fixed=2, opset=18)
      for policy in ("not_larger", "not_smaller")),
    Case("Resize", [IMAGE, SCALES], {"mode": "linear"}, fixed=1, opset=10),
    Case("Resize", [IMAGE, np.array([], np.float32), SCALES],
         {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, fixed=1, opset=11),
    Case("Upsample", [IMAGE, np.array([1, 1, 2, 3], np.float32)], {"mode": "linear"}, fixed=1, opset=9),
    *(Case("CenterCropPad", [IMAGE, i64(*shape)], {"axes": [3, 2]}, fixed=1, reference=True)
      for shape in ((5, 10), (11, 4))),
    Case("Col2Im", [f(2, 24, 9), i64(4, 4), i64(2, 2)], fixed=1),
    Case("Col2Im", [f(1, 9, 12), i64(6, 5), i64(3, 3)], {"pads": [1, 0, 1, 1], "strides": [2, 1], "dilations": [1, 1]},
         fixed=1, reference=True),
    Case("AffineGrid", [f(2, 2, 3), i64(2, 1, 3, 4)], fixed=1, reference=True),
    Case("GroupNormalization", [f(2, 6, 5), f(6), f(6)], {"num_groups": 3}),
    Case("GroupNormalization", [f(2, 6, 5), f(3), f(3)], {"num_groups": 3}, opset=18),
    Case("BatchNormalization", [IMAGE, f(3), f(3), f(3), np.abs(f(3))], {"training_mode": 1, "momentum": 0.6},
         outputs=3),
    Case("MeanVarianceNormalization", [IMAGE], {"axes": [2, -1]}),
    *(Case("DepthToSpace", [f(1, 12, 2, 3)], {"blocksize": 2, "mode": mode}) for mode in ("DCR", "CRD")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_node_computes_what_onnx_says(case: Case) -> None:
    with Session(onnxmesh.compile(case.model)) as session:
        got = session.run(None, case.feeds)
    for result, want in zip(got, case.expected(), strict=True):
        assert (result.shape, result.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(result, want, 1e-4, 1e-5)


@pytest.mark.parametrize("axis", ["tp", "dp"])
def test_indices_count_in_the_whole_tensor_though_each_rank_has_a_part(axis: str) -> None:
    """A convolution makes the ranks share the batch or the channels that are pooled."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["h"], ["y", "at"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("MaxUnpool", ["y", "at"], ["z"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 3, 8, 6]), ("z", None))]
    values.append(helper.make_tensor_value_info("at", TensorProto.INT64, None))
    weight = onnx.numpy_helper.from_array(f(4, 3, 3, 3), "w")
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = f(2, 3, 8, 6)
    want = ReferenceEvaluator(model).run(None, {"x": x})
    plan = onnxmesh.compile(model, **{axis: 2})
    with Session(plan) as session:
        got = session.run(None, {"x": x})
    np.testing.assert_allclose(got[0], want[0], 1e-4, 1e-5)
    np.testing.assert_array_equal(got[1], want[1])
    assert plan.report["rank"]["flops_share"] == 0.5


def test_whole_groups_of_channels_stay_with_a_rank() -> None:
    """Convolution, normalisation of groups, convolution: nothing is sent but the sums of the last."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("GroupNormalization", ["h", "scale", "bias"], ["n"], num_groups=4),
        helper.make_node("Conv", ["n", "v"], ["y"]),
    ]
    weights = {"w": f(8, 3, 1, 1), "scale": f(8), "bias": f(8), "v": f(3, 8, 1, 1)}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 64, 64]), ("y", None))]
    constants = [onnx.numpy_helper.from_array(x, name) for name, x in weights.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    plan = onnxmesh.compile(model, tp=4)
    assert [c["kind"] for c in plan.report["collectives"]] == ["AllReduce"]
    x = f(1, 3, 64, 64)
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    with Session(plan) as session:
        np.testing.assert_allclose(session.run(None, {"x": x})[0], want, 1e-4, 1e-4)


def test_scales_that_are_data_are_an_error_that_says_what_to_do() -> None:
    case = Case("Resize", [IMAGE, None, SCALES], {"mode": "linear"})
    model = case.model
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y0", TensorProto.FLOAT, [2, 3, 14, 4]))
    with pytest.raises(ModelError, match="scales") as error:
        onnxmesh.compile(model)
    assert "--value x2" in str(error.value.hint)
