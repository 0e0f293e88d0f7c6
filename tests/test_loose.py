"""Loose values: shapes that depend on data, sequences, optionals and strings, beside what is sharded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Command
from onnx.reference import ReferenceEvaluator

import onnxmesh
from onnxmesh.runtime import io, loose
from onnxmesh.runtime.errors import InvalidArgument, PlanError, RunError
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.validate import validate

RNG = np.random.default_rng(0)
HEADER = '<ir_version: 10, opset_import: ["": 21]>'


def parse(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADER + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def run(model: onnx.ModelProto, feeds: dict[str, Any], **options: Any) -> list[Any]:
    with onnxmesh.Session(onnxmesh.compile(model, **options)) as session:
        return session.run(None, feeds)


def assert_as_the_reference(model: onnx.ModelProto, feeds: dict[str, Any], **options: Any) -> None:
    for ours, expected in zip(run(model, feeds, **options), ReferenceEvaluator(model).run(None, feeds), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def kernels(plan: Plan) -> list[str]:
    return [item.kernel for item in plan.programs[0].instructions if hasattr(item, "kernel")]


# --- tensors as large as the data decide ---------------------------------------------------------------------

CHAIN = """
    chain (float[4, 6] x) => (float[] total, int64[rank, count] where) {
        where = NonZero(x)
        rows = Gather<axis = 0>(where, zero)
        picked = Gather<axis = 0>(x, rows)
        doubled = Mul(picked, two)
        total = ReduceSum<keepdims = 0>(doubled)
    }
"""
CHAIN_WEIGHTS = {"zero": np.array(0), "two": np.array(2, np.float32)}


@pytest.mark.parametrize("zeros", [0, 5, 24])
def test_a_chain_from_an_unknown_count_to_a_static_output(zeros: int) -> None:
    x = RNG.standard_normal((4, 6)).astype(np.float32)
    x.reshape(-1)[:zeros] = 0
    model = parse(CHAIN, **CHAIN_WEIGHTS)
    assert_as_the_reference(model, {"x": x})
    plan = onnxmesh.compile(model)
    assert kernels(plan) == ["NonZero", "Gather", "Gather", "Mul", "ReduceSum"]
    assert not plan.report["fallback"]
    total, where = plan.programs[0].outputs
    assert (total.dtype, total.shape, where.dtype, where.shape) == ("float32", (), "tensor(int64)", (2, -1))


def test_a_loose_chain_stands_beside_a_sharded_layer() -> None:
    text = """
        beside (float[4, 8] x) => (float[4, 8] y, float[] total) {
            h = MatMul(x, a)
            r = Relu(h)
            y = MatMul(r, b)
            where = NonZero(r)
            pairs = Transpose(where)
            picked = GatherND(r, pairs)
            total = ReduceSum<keepdims = 0>(picked)
        }
    """
    weights = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in (("a", (8, 16)), ("b", (16, 8)))}
    model, x = parse(text, **weights), RNG.standard_normal((4, 8)).astype(np.float32)
    plan = onnxmesh.compile(model, tp=2)
    assert [weight.name for weight in plan.weights if weight.spec] == ["a", "b"]
    reasons = {entry["op"]: entry["reason"] for entry in plan.report["replicated"]}
    assert "depends on data" in reasons["NonZero"]
    with onnxmesh.Session(plan) as session:
        ours = session.run(None, {"x": x})
    for mine, expected in zip(ours, ReferenceEvaluator(model).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


FORMS = {
    "Reshape": "y = Reshape(n, minus)",
    "Flatten": "y = Flatten<axis = 0>(n)",
    "Unsqueeze": "y = Unsqueeze(n, one)",
    "Slice": "y = Slice(n, one, three, one)",
    "Slice backwards": "y = Slice(n, minus, far, one, minus)",
    "Expand": "s = Shape(n) t = Concat<axis = 0>(three, s) y = Expand(n, t)",
    "Tile": "y = Tile(n, pair)",
    "Range": "s = Size(n) y = Range(scalar, s, step)",
    "ConstantOfShape": "s = Shape(n) y = ConstantOfShape<value = int64[1] {7}>(s)",
    "ReduceMax": "y = ReduceMax<keepdims = 1>(n, one)",
    "ReduceSum nothing": "y = ReduceSum<noop_with_empty_axes = 1>(n)",
    "Squeeze": "u = Unsqueeze(n, one) y = Squeeze(u, one)",
    "Concat": "y = Concat<axis = -1>(n, n)",
    "Where": "c = Equal(n, one) y = Where(c, n, three)",
    "Cast": "y = Cast<to = 1>(n)",
    "Unique": "f = Reshape(n, minus) y, i, j, k = Unique<sorted = 0>(f)",
    "Compress": "y = Compress(n, mask)",
    "Pow": "y = Pow(n, three)",
    "TopK": "y, i = TopK<largest = 0>(n, one)",
    "ArgMax": "y = ArgMax<axis = 1, keepdims = 0>(n)",
    "CumSum": "y = CumSum<reverse = 1>(n, scalar)",
    "Split": "y, z = Split<axis = 0, num_outputs = 2>(n)",
    "Split sizes": "z, y = Split(n, ones)",
    "Gemm": "f = Cast<to = 1>(n) g = Gemm<transA = 1, alpha = 0.5>(f, f) y = Cast<to = 7>(g)",
    "Transpose": "y = Transpose(n)",
    "Clip": "y = Clip(n, scalar, step)",
}


@pytest.mark.parametrize("form", FORMS)
def test_ops_on_tensors_of_unknown_size(form: str) -> None:
    constants = {
        **{"minus": [-1], "one": [1], "three": [3], "far": [-100], "pair": [1, 2], "ones": [1, 1]},
        **{"scalar": 0, "step": 2},
    }
    weights: dict[str, np.ndarray] = {name: np.array(value, np.int64) for name, value in constants.items()}
    weights["mask"] = np.array([True, False, True])
    body, out = FORMS[form].replace(") ", ")\n"), "float" if form == "Cast" else "int64"
    model = parse(f"g (float[3, 4] x) => ({out}[] y) {{ n = NonZero(x)\n{body} }}", **weights)
    assert not onnxmesh.compile(model).report["fallback"]
    x = (RNG.random((3, 4)) > 0.4).astype(np.float32)
    (ours,), expected = run(model, {"x": x}), ReferenceEvaluator(model).run(None, {"x": x})[0]
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


def test_a_declared_shape_makes_a_value_static_again_and_is_checked_when_it_runs() -> None:
    model = parse(
        "g (float[3] x) => (float[2, 4] y) { n = NonZero(x) f = Cast<to = 1>(n) y = MatMul(f, w) }".replace(
            ") ", ")\n"
        ),
        w=np.ones((2, 4), np.float32),
    )
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, [1, 2]))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4]))
    np.testing.assert_array_equal(run(model, {"x": np.array([1, 0, 2], np.float32)})[0], np.full((1, 4), 2))
    with pytest.raises(RunError, match=r"the result is float32\[1, 3\], the plan says float32\[1, 2\]"):
        run(model, {"x": np.array([1, 1, 2], np.float32)})


# --- sequences, optionals and strings ------------------------------------------------------------------------

PIECES = """
    pieces (seq(float[n]) given, int64[1] at) => (seq(float[n]) more, float[n] joined, int64 count) {
        one = SequenceAt(given, at)
        twice = Add(one, one)
        more = SequenceInsert(given, twice)
        joined = ConcatFromSequence<axis = 0>(more)
        count = SequenceLength(more)
    }
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_session_takes_and_gives_lists(ranks: int) -> None:
    given = [np.arange(n, dtype=np.float32) for n in (3, 1, 2)]
    with onnxmesh.Session(onnxmesh.compile(parse(PIECES), tp=ranks, allow_replicated=True)) as session:
        assert [arg.type for arg in session.get_inputs()] == ["seq(tensor(float))", "tensor(int64)"]
        types = [(arg.type, arg.shape) for arg in session.get_outputs()]
        assert types == [("seq(tensor(float))", []), ("tensor(float)", [None]), ("tensor(int64)", [])]
        for at in (0, -1):
            more, joined, count = session.run(None, {"given": given, "at": np.array([at])})
            assert [x.tolist() for x in more] == [x.tolist() for x in (*given, 2 * given[at])]
            np.testing.assert_array_equal(joined, np.concatenate(more))
            assert count == 4


def test_what_a_list_holds_stays_when_the_memory_that_it_came_from_is_written_again() -> None:
    model = parse("g (float[2] x) => (seq(float[2]) y) { h = Exp(x)\n y = SequenceConstruct(h, x) }")
    with onnxmesh.Session(onnxmesh.compile(model)) as session:
        first = session.run(None, {"x": np.zeros(2, np.float32)})[0]
        session.run(None, {"x": np.ones(2, np.float32)})
        assert [x.tolist() for x in first] == [[1, 1], [0, 0]]


def test_optionals_hold_something_or_nothing() -> None:
    model = parse(
        "g (optional(float[2]) x) => (bool has, optional(float[2]) y) { has = OptionalHasElement(x)\n y = Identity(x) }"
    )
    x = np.ones(2, np.float32)
    for given in (x, None):
        has, y = run(model, {"x": given})
        assert bool(has) == (given is not None)
        assert y is given if given is None else np.array_equal(y, x)


def test_an_optional_that_holds_nothing_is_saved(tmp_path: Path) -> None:
    kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [None])
    nodes = [
        onnx.helper.make_node("Optional", [], ["nothing"], type=kind),
        onnx.helper.make_node("OptionalHasElement", ["nothing"], ["y"]),
    ]
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.BOOL, [])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [], [y]), opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    onnxmesh.compile(model).save(tmp_path / "x.plan")
    with onnxmesh.Session(tmp_path / "x.plan") as session:
        assert not session.run(None, {})[0]


def test_strings_are_constants_inputs_and_outputs() -> None:
    model = parse("g (string[2] a) => (string[2] y, bool[2] same) { y = StringConcat(a, b)\n same = Equal(a, b) }")
    model.graph.initializer.append(onnx.helper.make_tensor("b", onnx.TensorProto.STRING, [2], ["x", "y"]))
    y, same = run(model, {"a": np.array(["p", "y"])})
    assert (y.tolist(), same.tolist()) == (["px", "yy"], [False, True])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ones(3, np.float32), "expected a list for seq(tensor(float)), got float32[3]"),
        ([np.ones(3, np.int64)], "expected tensor(float), got int64[3]"),
        ([None], "expected tensor(float), got nothing"),
    ],
)
def test_a_wrong_sequence_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        run(parse(PIECES), {"given": given, "at": np.array([0])})
    assert f"input 'given': {message}" in str(caught.value)


def test_a_saved_plan_runs_from_the_command_line(command: Command, tmp_path: Path) -> None:
    model, x = parse(CHAIN, **CHAIN_WEIGHTS), np.eye(4, 6, dtype=np.float32)
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=x)
    for arguments in (
        ("compile", tmp_path / "m.onnx", "-o", tmp_path / "m.plan"),
        ("inspect", tmp_path / "m.plan"),
        ("run", tmp_path / "m.plan", "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz"),
    ):
        done = command(*arguments)
        assert done.code == 0, done.err
    found = np.load(tmp_path / "y.npz")
    assert found["total"] == 2 * x[x.nonzero()[0]].sum()
    np.testing.assert_array_equal(found["where"], np.stack(x.nonzero()))


@pytest.mark.parametrize("target", ["out.npz", "out"])
def test_sequences_and_strings_pass_through_files(command: Command, tmp_path: Path, target: str) -> None:
    model = parse("""
        g (seq(float[n]) given, optional(float[n]) maybe, string[2] words)
            => (seq(float[n]) more, string[2] again, bool has, optional(float[n]) same) {
            zero = Constant<value_int = 0>()
            first = SequenceAt(given, zero)
            more = SequenceInsert(given, first)
            again = Identity(words)
            has = OptionalHasElement(maybe)
            same = Identity(maybe)
        }
    """)
    onnx.save(model, tmp_path / "m.onnx")
    given = {"given.0": np.ones(2, np.float32), "given.1": np.zeros(1, np.float32), "words": np.array(["a", "ÿ"])}
    np.savez(tmp_path / "x.npz", **given)
    assert command("compile", tmp_path / "m.onnx", "-o", tmp_path / "m.plan").code == 0
    done = command("run", tmp_path / "m.plan", "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / target)
    assert done.code == 0, done.err
    out = tmp_path / target
    found = dict(np.load(out)) if out.is_file() else {path.stem: np.load(path) for path in out.iterdir()}
    assert {name: x.tolist() for name, x in found.items()} == {
        **{"more.0": [1, 1], "more.1": [0], "more.2": [1, 1]},
        **{"again": ["a", "ÿ"], "has": False},
    }


def test_sequences_pass_through_the_files_of_onnx(tmp_path: Path) -> None:
    """As ONNX keeps its test data; what is written is read again."""
    (program,) = onnxmesh.compile(parse(PIECES)).programs
    values = {"given": [np.ones(2, np.float32), np.zeros(1, np.float32)], "at": np.array([1])}
    io.write_outputs(tmp_path, values, proto=True)
    for file in tmp_path.iterdir():
        file.rename(file.with_name(file.name.replace("output", "input")))
    found = io.read_inputs(tmp_path, program.inputs)
    assert [x.tolist() for x in found["given"]] == [[1, 1], [0]]
    assert found["at"].tolist() == [1]


def test_verify_compares_what_is_loose(command: Command, tmp_path: Path) -> None:
    onnx.save(parse(CHAIN, **CHAIN_WEIGHTS), tmp_path / "m.onnx")
    done = command("verify", tmp_path / "m.onnx")
    assert done.code == 0, done.err
    assert "where" in done.out


# --- damaged plans -------------------------------------------------------------------------------------------


def damaged(kind: str, changes: dict[str, Any]) -> Plan:
    """The chain's plan, with the first buffer of a kind changed."""
    plan = onnxmesh.compile(parse(CHAIN, **CHAIN_WEIGHTS))
    (program,) = plan.programs
    at = next(i for i, buffer in enumerate(program.buffers) if buffer.kind == kind)
    buffers = [replace(buffer, **changes) if i == at else buffer for i, buffer in enumerate(program.buffers)]
    return replace(plan, programs=(replace(program, buffers=tuple(buffers)),))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("loose", {"dtype": "int64", "shape": (2, 3)}, "is loose, but of the dtype int64"),
        ("loose", {"kind": "arena"}, "is of the type tensor(int64), but lies in memory"),
        ("loose", {"offset": 8}, "is loose, but has a place"),
        ("loose", {"shape": (2, -2)}, "has a negative dim"),
        ("loose", {"kind": "input", "source": 0}, "does not fit its input"),
        ("loose", {"kind": "input", "source": 7}, "there is no input 7"),
        ("arena", {"shape": (-1,)}, "has a negative dim"),
        ("arena", {"kind": "loose"}, "is loose, but of the dtype float32"),
    ],
)
def test_a_plan_with_wrong_loose_buffers_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        validate(damaged(kind, changes))
    assert message in str(caught.value)


def test_a_kernel_without_a_loose_form_is_refused() -> None:
    plan = onnxmesh.compile(parse(CHAIN, **CHAIN_WEIGHTS))
    (program,) = plan.programs
    instructions = (replace(program.instructions[0], kernel="Attention"), *program.instructions[1:])
    with pytest.raises(PlanError, match="no kernel for op 'Attention' of values without a static type"):
        validate(replace(plan, programs=(replace(program, instructions=instructions),)))


@pytest.mark.parametrize("text", ["tensor(flaot)", "seq()", "map(int64,tensor(float))", "tensor(float"])
def test_only_types_that_values_can_have_are_types(text: str) -> None:
    with pytest.raises(ValueError, match="unknown"):
        loose.check_type(text)
