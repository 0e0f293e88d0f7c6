"""Control flow that depends on data: its graphs are programs of their own, beside what is sharded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxmesh
from onnxmesh.compiler.errors import ModelError
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.onnx_weights import onnx_fetch
from onnxmesh.runtime.plan import Control, Plan
from onnxmesh.runtime.validate import validate

RNG = np.random.default_rng(0)
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Typed = dict[str, tuple[int, Any]]


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, ins: str, outs: str, **attributes: Any) -> onnx.NodeProto:
    """`-` is an absent input."""
    names = ["" if name == "-" else name for name in ins.split()]
    return helper.make_node(op, names, outs.split(), name=f"{op}_{outs.split()[0]}", **attributes)


def graph(
    nodes: list[onnx.NodeProto], ins: Typed, outs: Typed, weights: dict[str, np.ndarray] | None = None
) -> onnx.GraphProto:
    infos = ([helper.make_tensor_value_info(name, *kind) for name, kind in some.items()] for some in (ins, outs))
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    return helper.make_graph(nodes, "g", *infos, tensors)


def model(*arguments: Any) -> onnx.ModelProto:
    made = helper.make_model(graph(*arguments), opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def onnxruntime_of(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def assert_as_onnxruntime(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], **options: Any) -> Plan:
    plan = onnxmesh.compile(proto, **options)
    with onnxmesh.Session(plan) as session:
        ours = session.run(None, feeds)
    for mine, expected in zip(ours, onnxruntime_of(proto).run(None, feeds), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
        assert mine.dtype == expected.dtype
    return plan


def control(plan: Plan) -> Control:
    (found,) = (item for item in plan.programs[0].instructions if isinstance(item, Control))
    return found


# --- If -------------------------------------------------------------------------------------------------------


def choice() -> onnx.ModelProto:
    """As torch writes `torch.cond`: both branches use x, and each a weight of its own."""
    then = graph([node("MatMul", "x w", "a"), node("Relu", "a", "b")], {}, {"b": (FLOAT, None)})
    other = graph(
        [node("Constant", "", "two", value_float=2.0), node("Mul", "x two", "c")],
        {},
        {"c": (FLOAT, None)},
    )  # fmt: skip
    nodes = [
        node("ReduceSum", "x", "total", keepdims=0),
        node("Greater", "total zero", "is_positive"),
        node("If", "is_positive", "y", then_branch=then, else_branch=other),
        node("Exp", "y", "z"),
    ]
    weights = {"w": floats(4, 4), "zero": np.array(0, np.float32)}
    return model(nodes, {"x": (FLOAT, [3, 4])}, {"z": (FLOAT, [3, 4])}, weights)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_branch_is_chosen_when_it_runs(sign: int) -> None:
    plan = assert_as_onnxruntime(choice(), {"x": sign * np.abs(floats(3, 4))})
    assert set(control(plan).programs) == {"then_branch", "else_branch"}
    assert not any(buffer.is_loose for buffer in plan.programs[0].buffers)


def test_branches_of_different_shapes_make_a_loose_value() -> None:
    branches = {
        f"{name}_branch": graph([node("Slice", f"x start {stop}", "part")], {}, {"part": (FLOAT, None)})
        for name, stop in (("then", "one"), ("else", "three"))
    }
    weights = {name: np.array([n]) for name, n in (("start", 0), ("one", 1), ("three", 3))}
    proto = model(
        [node("If", "c", "y", **branches)], {"c": (BOOL, []), "x": (FLOAT, [5])}, {"y": (FLOAT, ["n"])}, weights
    )
    for c in (True, False):
        plan = assert_as_onnxruntime(proto, {"c": np.array(c), "x": floats(5)})
    port = plan.programs[0].outputs[0]
    assert (port.dtype, port.shape) == ("tensor(float)", (-1,))


def test_branches_of_different_types_are_refused() -> None:
    then = graph([node("Identity", "x", "a")], {}, {"a": (FLOAT, None)})
    other = graph([node("Cast", "x", "b", to=INT64)], {}, {"b": (INT64, None)})
    nodes = [node("If", "c", "y", then_branch=then, else_branch=other)]
    proto = helper.make_model(graph(nodes, {"c": (BOOL, []), "x": (FLOAT, [2])}, {"y": (FLOAT, [2])}), ir_version=10)
    with pytest.raises(ModelError, match=r"node 'If_y' \(If\) makes either .* of one value"):
        onnxmesh.compile(proto)


# --- Loop -----------------------------------------------------------------------------------------------------


def loop(trips: bool = True) -> onnx.ModelProto:
    """A layer whose weights tp cuts, and after it a loop that multiplies with a weight of the graph around it."""
    body = graph(
        [
            node("MatMul", "state shared", "product"),
            node("Add", "product b", "sum"),
            node("Tanh", "sum", "next"),
            node("ReduceMax", "next", "peak", keepdims=0),
            node("Less", "peak limit", "go"),
        ],
        {"i": (INT64, []), "was": (BOOL, []), "state": (FLOAT, None)},
        {"go": (BOOL, []), "next": (FLOAT, None), "peak": (FLOAT, None)},
        {"b": floats(8)},
    )
    nodes = [
        node("MatMul", "x up", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r down", "s"),
        node("Loop", f"{'n' if trips else 'many'} - s", "last peaks", body=body),
        node("MatMul", "last up", "y"),
    ]
    weights = {"up": floats(8, 16) / 4, "down": floats(16, 8) / 4, "shared": floats(8, 8) / 4, "many": np.array(4)}
    weights["limit"] = np.array(0.9999, np.float32)
    ins: Typed = {"x": (FLOAT, [4, 8]), **({"n": (INT64, [])} if trips else {})}
    return model(nodes, ins, {"y": (FLOAT, [4, 16]), "peaks": (FLOAT, ["count"])}, weights)


@pytest.mark.parametrize("trips", [0, 1, 5])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_loop_with_a_product_beside_a_sharded_layer(tp: int, trips: int) -> None:
    plan = assert_as_onnxruntime(loop(), {"x": floats(4, 8), "n": np.array(trips)}, tp=tp)
    item = control(plan)
    body = item.programs["body"]
    assert [port.name for port in body.inputs[-item.captured :]]
    assert not any(buffer.kind == "weight" for buffer in body.buffers), "what it reads is captured"
    if tp > 1:
        assert {"up", "down"} <= {weight.name for weight in plan.weights if weight.spec}
        reasons = {entry["op"]: entry["reason"] for entry in plan.report["replicated"]}
        assert reasons["Loop"] == "control flow runs whole on every rank"


def test_the_report_counts_the_memory_of_the_programs_within() -> None:
    plan = onnxmesh.compile(loop())
    inner = control(plan).programs["body"].arena_bytes
    assert inner > 0
    assert plan.report["rank"]["activation_bytes"] == plan.programs[0].arena_bytes + inner


def test_a_plan_with_control_flow_is_saved_and_read(tmp_path: Path) -> None:
    proto, feeds = loop(), {"x": floats(4, 8), "n": np.array(3)}
    plan = onnxmesh.compile(proto, tp=2)
    plan.save(tmp_path / "a.plan")
    found = onnxmesh.load(tmp_path / "a.plan")
    assert found.programs == plan.programs
    with onnxmesh.Session(found) as session:
        ours = session.run(["y"], feeds)[0]
    np.testing.assert_allclose(ours, onnxruntime_of(proto).run(["y"], feeds)[0], rtol=1e-5, atol=1e-6)
    assert onnxmesh.compile(proto, tp=2).programs == plan.programs, "equal input gives equal plans"


@pytest.mark.parametrize("inside", [False, True])
def test_weights_of_a_body_are_recipes_over_the_models_own(tmp_path: Path, inside: bool) -> None:
    """A transposed weight of the body, or of the graph around it, is stored as such, or read from the model's file."""
    weights = {"w": floats(200, 200) / 20}  # larger than what is folded
    body = graph(
        [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "state t", "next"), node("Identity", "was", "go")],
        {"i": (INT64, []), "was": (BOOL, []), "state": (FLOAT, None)},
        {"go": (BOOL, []), "next": (FLOAT, None)},
        weights if inside else {},
    )
    kinds: Typed = {"x": (FLOAT, [3, 200]), "n": (INT64, [])}
    proto = model([node("Loop", "n - x", "y", body=body)], kinds, {"y": (FLOAT, [3, 200])}, {} if inside else weights)
    before, feeds = proto.SerializeToString(), {"x": floats(3, 200), "n": np.array(2)}
    plan = onnxmesh.compile(proto)
    assert proto.SerializeToString() == before, "the caller's model is as it was"
    assert [weight.recipe["op"] for weight in plan.weights] == ["transpose"]
    onnx.save(proto, tmp_path / "m.onnx")
    plan.save(tmp_path / "m.plan", weights=False)
    with onnxmesh.Session(onnxmesh.load(tmp_path / "m.plan"), weights=onnx_fetch(tmp_path / "m.onnx")) as session:
        np.testing.assert_allclose(
            session.run(None, feeds)[0], onnxruntime_of(proto).run(None, feeds)[0], rtol=1e-4, atol=1e-5
        )


def counted(cond: str = "was") -> onnx.ModelProto:
    body = graph(
        [node("Identity", cond, "go"), node("Add", "state state", "next"), node("Cast", "i", "f", to=FLOAT)],
        {"i": (INT64, []), "was": (BOOL, []), "state": (FLOAT, None)},
        {"go": (BOOL, []), "next": (FLOAT, None), "f": (FLOAT, None)},
    )
    nodes = [node("Loop", "many true x", "last rows", body=body)]
    weights = {"many": np.array(4), "true": np.array(True)}
    return model(nodes, {"x": (FLOAT, [2])}, {"last": (FLOAT, [2]), "rows": (FLOAT, ["count"])}, weights)


@pytest.mark.parametrize("condition", ["was", "true"])
def test_a_loop_that_nothing_ends_has_outputs_of_static_shape(condition: str) -> None:
    plan = assert_as_onnxruntime(counted(condition), {"x": floats(2)})
    assert [port.shape for port in plan.programs[0].outputs] == [(2,), (4,)]
    assert not any(port.is_loose for port in plan.programs[0].outputs)


def test_what_grows_in_a_loop_is_loose() -> None:
    body = graph(
        [node("Identity", "was", "go"), node("Concat", "state x", "next", axis=0)],
        {"i": (INT64, []), "was": (BOOL, []), "state": (FLOAT, None)},
        {"go": (BOOL, []), "next": (FLOAT, None)},
    )
    nodes = [node("Loop", "n - x", "last", body=body), node("ReduceSum", "last", "y", keepdims=0)]
    proto = model(nodes, {"x": (FLOAT, [2, 3]), "n": (INT64, [])}, {"y": (FLOAT, []), "last": (FLOAT, ["m", 3])})
    plan = assert_as_onnxruntime(proto, {"x": floats(2, 3), "n": np.array(3)})
    assert [(port.dtype, port.shape) for port in plan.programs[0].outputs] == [
        ("float32", ()),
        ("tensor(float)", (-1, 3)),
    ]


def test_carried_values_may_change_places() -> None:
    body = graph(
        [node("Identity", "was", "go"), node("Identity", "b", "c"), node("Identity", "a", "d")],
        {"i": (INT64, []), "was": (BOOL, []), "a": (FLOAT, None), "b": (FLOAT, None)},
        {"go": (BOOL, []), "c": (FLOAT, None), "d": (FLOAT, None)},
    )
    ins: Typed = {"n": (INT64, []), "x": (FLOAT, [2]), "z": (FLOAT, [2])}
    proto = model([node("Loop", "n - x z", "p q", body=body)], ins, {"p": (FLOAT, [2]), "q": (FLOAT, [2])})
    for n in range(4):
        assert_as_onnxruntime(proto, {"n": np.array(n), "x": floats(2), "z": floats(2)})


def test_control_flow_in_control_flow() -> None:
    """A branch inside of a loop captures a value of the loop, one of the graph, and a weight of the graph."""
    then = graph([node("MatMul", "state w", "grown")], {}, {"grown": (FLOAT, None)})
    other = graph([node("Add", "state x", "sum")], {}, {"sum": (FLOAT, None)})
    body = graph(
        [
            node("Mod", "i two", "odd"),
            node("Cast", "odd", "is_odd", to=BOOL),
            node("If", "is_odd", "next", then_branch=then, else_branch=other),
            node("Identity", "was", "go"),
        ],
        {"i": (INT64, []), "was": (BOOL, []), "state": (FLOAT, None)},
        {"go": (BOOL, []), "next": (FLOAT, None)},
        {"two": np.array(2)},
    )
    nodes = [node("Neg", "x", "start"), node("Loop", "n - start", "y", body=body)]
    proto = model(nodes, {"x": (FLOAT, [3, 3]), "n": (INT64, [])}, {"y": (FLOAT, [3, 3])}, {"w": floats(3, 3)})
    for n in (0, 1, 4):
        assert_as_onnxruntime(proto, {"x": floats(3, 3), "n": np.array(n)}, tp=2, allow_replicated=True)


# --- Scan -----------------------------------------------------------------------------------------------------


def test_a_scan_along_other_axes_and_backwards() -> None:
    body = graph(
        [node("MatMul", "slice w", "p"), node("Add", "state p", "next"), node("Identity", "next", "row")],
        {"state": (FLOAT, None), "slice": (FLOAT, None)},
        {"next": (FLOAT, None), "row": (FLOAT, None)},
    )
    attributes = {"scan_input_axes": [1], "scan_input_directions": [1]}
    attributes |= {"scan_output_axes": [1], "scan_output_directions": [1]}
    nodes = [node("Scan", "zero x", "last rows", body=body, num_scan_inputs=1, **attributes)]
    weights = {"w": floats(3, 4), "zero": np.zeros((2, 4), np.float32)}
    x = floats(2, 5, 3)
    proto = model(nodes, {"x": (FLOAT, [2, 5, 3])}, {"last": (FLOAT, [2, 4]), "rows": (FLOAT, [2, 5, 4])}, weights)
    with onnxmesh.Session(onnxmesh.compile(proto)) as session:
        last, rows = session.run(None, {"x": x})
    sums = np.cumsum((x @ weights["w"])[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(rows, sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last, sums[:, 0], rtol=1e-5, atol=1e-6)


# --- damaged plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "If"}, "wrong programs for If"),
        ({"kernel": "MatMul"}, "wrong programs for MatMul"),
        ({"captured": 99}, "captures more than it reads"),
        ({"ins": (0, 0, 0)}, "wrong number of inputs or outputs"),
        ({"outs": ()}, "wrong number of inputs or outputs"),
        ({"programs": {}}, "wrong programs for Loop"),
    ],
)
def test_a_plan_with_wrong_control_flow_is_refused(changes: dict[str, Any], message: str) -> None:
    plan = onnxmesh.compile(loop())
    (program,) = plan.programs
    instructions = tuple(replace(i, **changes) if isinstance(i, Control) else i for i in program.instructions)
    with pytest.raises(PlanError) as caught:
        validate(replace(plan, programs=(replace(program, instructions=instructions),)))
    assert message in str(caught.value)
