"""Verification: what counts as equal, and what it is compared with."""

from __future__ import annotations

import inputs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxmesh
from onnxmesh.compiler import verification
from onnxmesh.compiler.errors import VerificationError
from onnxmesh.compiler.verification import Verification, compare, reference, widen

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("ours", "expected", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([3.0, NAN], [3.0, NAN], 0.0),
        ([3.0, NAN], [3.0, 4.0], INF),
        ([3.0, 4.0], [3.0, NAN], INF),
        ([3.0, INF], [3.0, INF], 0.0),
        ([3.0, -INF], [3.0, INF], INF),
        ([3.0, INF], [3.0, 1e30], INF),
        ([0.5, 0.0], [0.0, 0.0], 0.5),
        ([], [], 0.0),
        ([[1.0, 2.0]], [1.0, 2.0], INF),
    ],
)
def test_relative_error(ours: list[float], expected: list[float], error: float) -> None:
    found = compare("y", np.array(ours, np.float32), np.array(expected), 0.2)
    assert found.error == pytest.approx(error)
    assert found.agrees == (error <= 0.2)
    assert bool(found.note) == (error == INF)


def test_small_integers_and_booleans_are_numbers() -> None:
    assert compare("y", np.array([True, False]), np.array([True, False]), 0).agrees
    assert compare("y", np.array([1, 2], np.uint8), np.array([2, 2], np.uint8), 0).error == pytest.approx(8**-0.5)


def test_the_worst_output_is_named() -> None:
    rows = [compare(n, np.array([x]), np.array([1.0]), 1e-4) for n, x in (("a", 1.0), ("b", 1.1), ("c", 1.3))]
    with pytest.raises(VerificationError, match=r"2 of 3 outputs differ from it; the worst is 'c': .*0\.3, allowed"):
        Verification("it", tuple(rows)).check()


@pytest.mark.parametrize(("name", "limit"), [("llama_op23", 1e-4), ("llama_fp16", 2e-2), ("llama_bf16", 2e-2)])
def test_half_precision_has_its_own_tolerance(name: str, limit: float) -> None:
    fixture = inputs.load(name)
    plan = onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings())
    result = verification.verify(plan, fixture.path, fixture.make_inputs())
    assert [item.tolerance for item in result.outputs] == [limit] * len(fixture.outputs)
    result.check()
    assert ("ONNX Runtime" in result.reference) == fixture.runs_in_ort


def test_a_model_is_widened_everywhere(tmp_path: object) -> None:
    model = onnx.load(inputs.load("llama_bf16").path)
    wide = widen(model)
    onnx.checker.check_model(wide)
    text = str(wide)
    assert f"elem_type: {TensorProto.BFLOAT16}\n" not in text
    assert all(tensor.data_type != TensorProto.BFLOAT16 for tensor in wide.graph.initializer)


def test_both_references_agree() -> None:
    fixture = inputs.load("llama_op18")
    feeds = fixture.make_inputs()
    ours = verification._with_reference(fixture.path, feeds)[1]
    for name, expected in reference(fixture.path, feeds)[1].items():
        assert compare(name, ours[name], expected, 1e-4).agrees


def test_without_any_reference(tmp_path: object) -> None:
    graph = helper.make_graph(
        [helper.make_node("Secret", ["x"], ["y"], domain="com.example")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("com.example", 1)], ir_version=10)
    path = f"{tmp_path}/model.onnx"
    onnx.save(model, path)
    with pytest.raises(VerificationError, match=r"nothing can run the model whole: ONNX Runtime: .*; onnx.reference:"):
        reference(path, {"x": np.ones(2, np.float32)})
