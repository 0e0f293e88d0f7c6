"""Inputs bound by value: what decides shapes becomes a constant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Command, check_failure

import onnxmesh
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.frontend import load
from onnxmesh.passes.graph.deciding import deciding_inputs
from onnxmesh.runtime.errors import InvalidArgument

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def model(body: str, given: str, made: str = "float[M] y") -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g ({given}) => ({made}) {{ {body} }}')


SUM = model("y = ReduceSum <keepdims: int = 0> (x, axes)", "float[2, 3, 4] x, int64[n] axes")


def run(proto: onnx.ModelProto, feeds: dict[str, Any], **values: Any) -> np.ndarray:
    with onnxmesh.Session(onnxmesh.compile(proto, values=values)) as session:
        (output,) = session.run(None, feeds)
        return output


def refused(proto: onnx.ModelProto, **values: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        onnxmesh.compile(proto, values=values)
    return caught.value


# --- compiling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [np.array([0, 2]), [0, 2], (0, 2)])
def test_a_bound_input_is_a_constant_and_no_input(axes: Any) -> None:
    plan = onnxmesh.compile(SUM, values={"axes": axes})
    assert [port.name for port in plan.programs[0].inputs] == ["x"]
    np.testing.assert_allclose(run(SUM, {"x": X}, axes=axes), X.sum((0, 2)))


def test_a_value_binds_the_named_dims_of_its_input() -> None:
    proto = model("y = Add(x, z)", "float[n] x, float[n] z")
    np.testing.assert_array_equal(run(proto, {"x": np.ones(3, np.float32)}, z=[1, 2, 3]), [2, 3, 4])


def test_shapes_may_be_computed_of_a_value() -> None:
    proto = model("""
        two = Constant <value_ints: ints = [2]> ()
        shape = Concat <axis: int = 0> (two, rest)
        y = Reshape(x, shape)""", "float[2, 3, 4] x, int64[m] rest")  # fmt: skip
    assert run(proto, {"x": X}, rest=[4, 3]).shape == (2, 4, 3)


def test_an_output_that_is_an_input_stays_an_output() -> None:
    proto = model("y = Neg(x)", "float[2] x", "float[2] y, float[2] x")
    with onnxmesh.Session(onnxmesh.compile(proto, values={"x": [1, 2]})) as session:
        np.testing.assert_array_equal(session.run(None, {}), [[-1, -2], [1, 2]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"axis": [0]}, "the model has no input 'axis' to bind to a value"),
        ({"axes": np.array([0], np.int32)}, "input 'axes' is int64, but its value is int32"),
        ({"axes": [0.5]}, "input 'axes' is int64, which cannot hold the value [0.5]"),
        ({"axes": "all"}, "input 'axes' is int64, which cannot hold the value 'all'"),
        ({"axes": 0}, "input 'axes' has the shape [n], but its value has []"),
        ({"x": X[0]}, "input 'x' has the shape [2, 3, 4], but its value has [3, 4]"),
    ],
)
def test_a_value_must_fit_its_input(values: dict[str, Any], message: str) -> None:
    assert refused(SUM, **values).args[0] == message


def test_a_warning_or_an_error_names_the_option_that_would_help() -> None:
    (warning,) = onnxmesh.compile(SUM, dims={"n": 1}).report["warnings"]
    assert "give --value axes=..., which binds that input to a value" in warning["reason"]
    proto = model("t = Neg(s)\n z = Reshape(x, t)\n y = Reshape(z, s)", "float[6] x, int64[2] s")
    assert "2 nodes are computed by every rank" in onnxmesh.compile(proto).report["warnings"][0]["reason"]
    proto = model("y = CumSum(x, axis)", "float[6] x, int64[1] axis", "float[6] y")
    assert "--value axis=..." in refused(proto).hint


# --- running ------------------------------------------------------------------------------------------------


def test_a_run_may_be_given_the_bound_value_again_but_no_other() -> None:
    with onnxmesh.Session(onnxmesh.compile(SUM, values={"axes": [0]})) as session:
        np.testing.assert_allclose(session.run(None, {"x": X, "axes": np.array([0])})[0], X.sum(0))
        with pytest.raises(InvalidArgument, match=r"input 'axes' was bound to int64\[1\] \[0\] .* \[1"):
            session.run(None, {"x": X, "axes": np.array([1])})


def test_plan_and_report_keep_the_values(tmp_path: Path) -> None:
    plan = onnxmesh.compile(SUM, values={"axes": [1]})
    plan.save(tmp_path / "a.plan")
    found = onnxmesh.load(tmp_path / "a.plan")
    assert found == plan
    assert found.report["options"]["values"] == {"axes": {"dtype": "int64", "shape": [1], "value": [1]}}
    with onnxmesh.Session(found) as session:
        np.testing.assert_allclose(session.run(None, {"x": X})[0], X.sum(1))


def test_the_command_line_takes_json_and_files(command: Command, tmp_path: Path) -> None:
    onnx.save(SUM, tmp_path / "sum.onnx")
    np.save(tmp_path / "axes.npy", np.array([2]))
    for given in ("axes=[2]", f"axes=@{tmp_path / 'axes.npy'}"):
        done = command("verify", tmp_path / "sum.onnx", "--value", given, "--shape", "axes=1")
        assert done.code == 0, done.err
    check_failure(command("compile", tmp_path / "sum.onnx", "--value", "axes=[2"), 2, "neither JSON")


# --- which inputs decide ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "given", "expected"),
    [
        ("y = Reshape(x, s)", "float[N] x, int64[m] s", ["s"]),
        ("y = Slice(x, a, b)", "float[N] x, int64[1] a, int64[1] b", ["a", "b"]),
        ("y = Add(x, z)", "float[N] x, float[N] z", []),
        ("s = Shape(z) y = Expand(x, s)", "float[N] x, float[M] z", []),
        ("c = Cast <to: int = 7> (z) y = ConstantOfShape(c)", "float[2] z", ["z"]),
        ("n = NonZero(x) y = Reshape(x, n)", "float[4] x", []),
        (
            """c = Constant <value_int: int = 1> ()
               s = If (c) <then_branch = t () => (u) {u = Neg(z)}, else_branch = e () => (v) {v = Abs(w)}>
               y = Reshape(x, s)""",
            "float[4] x, int64[1] z, int64[1] w",
            ["z", "w"],
        ),
        ("y = Range(a, b, c)", "float a, float b, float c", ["a", "b", "c"]),
    ],
)
def test_deciding_inputs_are_traced_backwards(body: str, given: str, expected: list[str]) -> None:
    assert deciding_inputs(load(model(body, given))) == expected


def test_a_scalar_may_be_bound_as_a_vector_of_one() -> None:
    proto = model("y = Range(a, b, c)", "int64[1] a, int64[1] b, int64[1] c", "int64[M] y")
    np.testing.assert_array_equal(run(proto, {}, a=[1], b=[7], c=[2]), [1, 3, 5])
