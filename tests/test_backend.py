"""onnxmesh.backend: the interface of onnx.backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper
from onnx.backend.base import BackendRep

from onnxmesh import backend
from onnxmesh.backend.__main__ import main
from onnxmesh.compiler.errors import ModelError
from onnxmesh.runtime.errors import InvalidArgument, OnnxMeshError

X = np.arange(32, dtype=np.float32).reshape(2, 16)
W = np.ones((16, 8), np.float32)


def model(body: str, given: str, made: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g ({given}) => ({made}) {{ {body} }}')


DYNAMIC = model("y = MatMul(x, w)", "float[b, k] x, float[k, n] w", "float[b, n] y")
SUM = model("y = ReduceSum <keepdims: int = 0> (x, axes)", "float[a, b] x, int64[n] axes", "float[c] y")


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["CPU", "CPU:1", "CPU:2", "CPU:4"])
def test_a_model_runs_on_any_number_of_ranks(device: str) -> None:
    (y,) = backend.run_model(DYNAMIC, [X, W], device)
    np.testing.assert_allclose(y, X @ W)


def test_a_device_of_several_ranks_is_that_many_ranks_of_tensor_parallelism() -> None:
    with backend.prepare(DYNAMIC, "CPU:2") as rep:
        rep.run([X, W])
        assert rep.plan is not None
        assert rep.plan.mesh.to_json() == {"dp": 1, "cp": 1, "tp": 2}


def test_inputs_are_given_in_order_or_by_name() -> None:
    with backend.prepare(DYNAMIC) as rep:
        assert isinstance(rep, BackendRep)
        assert rep.inputs == ["x", "w"]
        np.testing.assert_array_equal(rep.run([X, W])[0], rep.run({"w": W, "x": X})[0])


def test_a_plan_serves_its_shapes_and_values_and_others_get_their_own() -> None:
    with backend.prepare(SUM) as rep:
        seen = []
        for x, axes in ((X, [0]), (X + 1, [0]), (X, [1]), (X[:, :3], [0]), (X, [0])):
            np.testing.assert_allclose(rep.run([x, np.array(axes)])[0], x.sum(axes[0]))
            seen.append(rep.plan)
        assert seen[0] is seen[1] is seen[4]
        assert len({id(plan) for plan in seen}) == 3


def test_inputs_that_initialisers_fill_are_not_asked_for() -> None:
    proto = model("y = MatMul(x, w)", "float[2, 16] x, float[16, 8] w", "float[2, 8] y")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    (y,) = backend.run_model(proto, [X])
    np.testing.assert_allclose(y, X @ W)


def test_prepare_refuses_what_is_no_model() -> None:
    with pytest.raises(ModelError):
        backend.prepare(b"no model")
    assert not backend.is_compatible(b"no model")
    assert backend.is_compatible(DYNAMIC)
    assert not backend.is_compatible(DYNAMIC, "TPU")


@pytest.mark.parametrize("inputs", [[X], [X, W, W], [X, W.astype(np.float64)], [X, W[:3]], {"x": X, "v": W}])
def test_inputs_that_do_not_fit_are_refused(inputs: Any) -> None:
    with backend.prepare(DYNAMIC) as rep, pytest.raises(OnnxMeshError):
        rep.run(inputs)


# --- nodes --------------------------------------------------------------------------------------------------


def test_a_node_runs_by_itself() -> None:
    (y,) = backend.run_node(helper.make_node("Softmax", ["x"], ["y"], axis=0), [X])
    np.testing.assert_allclose(y.sum(0), np.ones(16), rtol=1e-6)


def test_a_node_may_leave_inputs_out_and_have_several_outputs() -> None:
    low = helper.make_node("Clip", ["x", "", "high"], ["y"])
    np.testing.assert_array_equal(backend.run_node(low, [X, np.float32(3)])[0], X.clip(max=3))
    best = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    values, places = backend.run_node(best, {"x": X, "k": np.array([2])})
    np.testing.assert_array_equal(values, X[:, :-3:-1])
    np.testing.assert_array_equal(places, [[15, 14]] * 2)


def test_a_node_may_be_of_an_older_opset_with_its_outputs_described() -> None:
    node = helper.make_node("ReduceMax", ["x"], ["y"], axes=[1], keepdims=0)
    (y,) = backend.run_node(node, [X], outputs_info=[(np.float32, (2,))], opset_version=13)
    np.testing.assert_array_equal(y, X.max(1))


def test_a_node_that_does_not_fit_its_inputs_is_refused() -> None:
    with pytest.raises(ModelError, match="MatMul does not fit its inputs"):
        backend.run_node(helper.make_node("MatMul", ["x", "w"], ["y"]), [X, X])


# --- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "there"),
    [("CPU", True), ("CPU:4", True), ("CPU:0", False), ("CPU:65", False), ("CPU:x", False), ("cpu", False), ("", False)]
)  # fmt: skip
def test_devices(device: str, there: bool) -> None:
    assert backend.supports_device(device) is there
    if not there:
        with pytest.raises(InvalidArgument, match="unknown device"):
            backend.prepare(DYNAMIC, device)


# --- the command line ---------------------------------------------------------------------------------------


def test_tests_are_run_by_name() -> None:
    done = CliRunner().invoke(main, ["test_abs", "test_ten*", "--processes", "1"])
    assert [line.split() for line in done.output.splitlines()][:1] == [["native", "test_abs"]]


@pytest.mark.parametrize(
    ("given", "says"),
    [(["--device", "TPU"], "there is no device TPU"), (["test_abs", "--store"], "leave the patterns out")],
)
def test_the_command_line_refuses(given: list[str], says: str) -> None:
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 2
    assert says in done.output
