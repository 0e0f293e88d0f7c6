"""verify --each: a wrong kernel is found to its node and rank, and rounding is not called wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import inputs
import numpy as np
import onnx
import pytest
from command import Command
from inputs import Fixture
from onnx import TensorProto, helper, numpy_helper
from planted import Change, off_by_one_row, planted, wrong_scale, wrong_sign

import onnxmesh
from onnxmesh.compiler.errors import VerificationError
from onnxmesh.runtime.plan import Plan
from onnxmesh.verification.each import Examination, examine
from onnxmesh.verification.model import Model
from onnxmesh.verification.replay import Suspect, suspects

EXPORTS = [
    ("llama_op23", {"tp": 2, "cp": 2}),
    ("flux_op18", {"cp": 2}),
    ("bert_ts17", {"tp": 2}),
    ("t5_op18", {"tp": 2}),
    ("llama_fp16", {"tp": 2}),
    ("llama_bf16", {"tp": 2, "cp": 2}),
]


def compiled(name: str, mesh: Mapping[str, int]) -> tuple[Fixture, Plan]:
    fixture = inputs.load(name)
    return fixture, onnxmesh.compile(fixture.path, **mesh, dims=fixture.bindings())


@pytest.mark.parametrize(("name", "mesh"), EXPORTS)
def test_a_right_run_agrees_tensor_by_tensor(name: str, mesh: Mapping[str, int]) -> None:
    fixture, plan = compiled(name, mesh)
    found = examine(plan, fixture.path, fixture.make_inputs())
    found.check()
    values = {item.name for item in found.compared}
    assert len(values) >= 25
    assert set(fixture.outputs) <= values
    assert values.isdisjoint(found.skipped)


CASES = [
    ("llama_op23", {"tp": 2}, "FusedNorm", off_by_one_row, {"tp": 1}, "node_RMSNormalization_355"),
    ("llama_op23", {"tp": 2}, "MatMul", wrong_sign, {"tp": 0}, "node_linear_3"),
    ("flux_op18", {"cp": 2}, "FusedMatMul", wrong_sign, {"cp": 1}, "node_MatMul_1"),
    ("flux_op18", {"tp": 2}, "FusedNorm", wrong_scale, {"tp": 1}, ""),
    ("bert_op18", {"cp": 2}, "LayerNormalization", off_by_one_row, {"cp": 0}, "node_layer_norm_1"),
    ("t5_op18", {"tp": 2, "cp": 2}, "MatMul", wrong_scale, {"cp": 0, "tp": 1}, "node_linear_3"),
]


@pytest.mark.parametrize(("name", "mesh", "kernel", "change", "coordinate", "node"), CASES)
def test_a_planted_wrong_kernel_is_found_to_its_node_and_rank(
    name: str, mesh: Mapping[str, int], kernel: str, change: Change, coordinate: Mapping[str, int], node: str
) -> None:
    fixture, plan = compiled(name, mesh)
    rank = plan.mesh.rank(coordinate)
    with planted(kernel, change, coordinate, node):
        found, behind = examined(plan, fixture)
    places = [i for i, x in enumerate(plan.programs[0].instructions) if getattr(x, "kernel", "") == kernel]
    first = next(i for i in places if node in plan.programs[0].instructions[i].node)
    assert rank in found.differences[0].ranks
    assert [(x.instruction, x.kernel, x.rank) for x in behind] == [(first, kernel, rank)]
    assert behind[0].node == plan.programs[0].instructions[first].node
    assert found.differences[0].compared.instruction >= first


def examined(plan: Plan, fixture: Fixture) -> tuple[Examination, list[Suspect]]:
    """What is found, and what is behind the first difference."""
    feeds = fixture.make_inputs()
    found = examine(plan, fixture.path, feeds)
    check = found.differences[0].check
    return found, suspects(plan, feeds, check.tensor, check.anchors.values())


def test_a_run_in_half_precision_is_compared_with_the_float32_model() -> None:
    fixture = inputs.load("llama_op23")
    plan = onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings(), precision="bf16")
    found = examine(plan, fixture.path, fixture.make_inputs())
    found.check()
    assert any(item.dtype == "bfloat16" for item in found.compared)


def test_what_follows_a_wrong_tensor_is_not_called_wrong() -> None:
    fixture, plan = compiled("llama_op23", {"cp": 2})
    with planted("RMSNormalization", off_by_one_row, {"cp": 1}, "node_RMSNormalization_355"):
        found = examine(plan, fixture.path, fixture.make_inputs())
    assert [item.compared.name for item in found.differences] == ["mul_319"]
    with pytest.raises(
        VerificationError, match=r"1 of \d+ .* 'mul_319' of node 'node_RMSNormalization_355' on rank 1, element \[0, 8"
    ):
        found.check()


def test_both_values_and_both_places_of_an_element_are_named() -> None:
    fixture, plan = compiled("llama_op23", {"tp": 2, "cp": 2})
    feeds = fixture.make_inputs()
    right = examine(plan, fixture.path, feeds)
    with planted("Fused", lambda x: x + 1, {"cp": 1, "tp": 1}, "node_mul_332"):
        found = examine(plan, fixture.path, feeds)
    assert not right.differences
    (wrong,) = [item for item in found.differences if item.compared.name == "mul_332"]
    assert wrong.compared.placement == {"cp": "S(1)", "tp": "S(2)"}
    assert wrong.ranks == (3,)
    assert wrong.index == (0, 8, 48)
    assert wrong.local_index == (0, 0, 0)
    assert wrong.compared.wrong == 2 * 8 * 48
    assert wrong.ours == pytest.approx(wrong.reference + 1, rel=1e-5)
    assert wrong.float64 == pytest.approx(float(wrong.reference), rel=1e-5)
    assert set(wrong.arrays) >= {"rank0", "rank3", "reference", "float64"}


# --- rounding -----------------------------------------------------------------------------------------------


def another_order(x: np.ndarray) -> np.ndarray:
    """What sums of some thousand terms in another order may come to."""
    rng = np.random.default_rng(0)
    return (x * (1 + rng.uniform(-1, 1, x.shape) * 2**-21)).astype(x.dtype)


def a_rounding_more(x: np.ndarray) -> np.ndarray:
    """Each element to one of its two neighbours in its dtype, as where a result is rounded twice."""
    wide, rng = x.astype(np.float32), np.random.default_rng(0)
    return (wide * (1 + rng.choice([-1.2, 1.2], x.shape) * 2.0**-8)).astype(x.dtype)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to 8 bits, in float32."""
    return (x.astype(np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize(
    ("name", "kernel", "change"),
    [
        ("llama_op23", "MatMul", another_order),
        ("bert_op18", "MatMul", another_order),
        ("llama_bf16", "MatMul", a_rounding_more),
    ],
)
def test_a_planted_rounding_difference_is_not_called_an_error(name: str, kernel: str, change: Change) -> None:
    fixture, plan = compiled(name, {"tp": 2})
    feeds = fixture.make_inputs()
    right = examine(plan, fixture.path, feeds)
    with planted(kernel, change):
        found = examine(plan, fixture.path, feeds)
    assert not found.differences
    assert sum(x.error for x in found.compared) > sum(x.error for x in right.compared)  # it was planted


def test_float32_that_is_rounded_to_bfloat16_is_an_error() -> None:
    fixture, plan = compiled("llama_op23", {"tp": 2})
    with planted("MatMul", to_bfloat16, {"tp": 1}, "node_linear_3"):
        found = examine(plan, fixture.path, fixture.make_inputs())
    assert [item.compared.name for item in found.differences] == ["linear_3"]


def test_cancellation_is_told_from_errors_by_float64(tmp_path: Path) -> None:
    """Sums that are almost nothing: the reference's result is itself all rounding."""
    path = tmp_path / "model.onnx"
    terms = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32)
    weight = np.concatenate([terms, -terms + 1e-7], axis=1)[:, :, None]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="cancel"), helper.make_node("Relu", ["y"], ["z"])]
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 2, 4096])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [64, 2, 1])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    plan = onnxmesh.compile(path, dp=2)
    found = examine(plan, path, {"x": np.ones((64, 2, 4096), np.float32)})
    assert not found.differences
    assert found.exact >= 1
    with planted("MatMul", lambda x: x + 1e-2, {"dp": 1}):
        assert examine(plan, path, {"x": np.ones((64, 2, 4096), np.float32)}).differences


# --- memory, plans, the command -----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the highest resident set is Linux's to tell")
@pytest.mark.parametrize("planting", ["right", "wrong"])
def test_peak_memory_is_below_twice_the_largest_live_set(planting: str) -> None:
    script = Path(__file__).with_name("verify_memory.py")
    done = subprocess.run([sys.executable, script, planting], capture_output=True, text=True, timeout=300, check=True)
    figures = json.loads(done.stdout)
    assert 90e6 < figures["live"] < 120e6
    assert figures["compared"] == 30
    assert bool(figures["wrong"]) == (planting == "wrong")
    assert figures["peak"] < 2 * figures["live"]


def test_a_plan_that_does_not_say_what_it_holds_is_refused() -> None:
    fixture, plan = compiled("mlp_op18", {"tp": 2})
    plan.report.pop("trace")  # type: ignore[attr-defined]
    with pytest.raises(VerificationError, match="does not say which values of the model it holds"):
        examine(plan, fixture.path, fixture.make_inputs())


def test_random_numbers_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["r"], seed=1.0),
        helper.make_node("Add", ["x", "r"], ["y"]),
        helper.make_node("Exp", ["y"], ["z"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 4]) for name in ("x", "y", "z")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    found = examine(onnxmesh.compile(path), path, {"x": np.ones((8, 4), np.float32)})
    assert "random numbers" in found.reasons
    assert "z" in {item.name for item in found.compared}  # from the y that the run made
    assert not found.differences


def test_the_segment_of_a_value_ends_at_known_values() -> None:
    model = Model(inputs.load("mlp_op18").path)
    (output,) = model.outputs
    everything = model.segment([output], ())
    last = model.segment([output], [name for name in model.values if name != output])
    assert len(last.nodes) == 1
    assert set(last.nodes) < set(everything.nodes)
    assert set(everything.inputs) <= set(model.inputs)


def verify_arguments(fixture: Fixture, *more: str) -> list[str]:
    dims = [word for name, size in fixture.bindings().items() for word in ("--dim", f"{name}={size}")]
    return ["verify", str(fixture.path), "--tp", "2", *dims, "--each", *more]


def test_the_command_says_how_much_was_compared(command: Command) -> None:
    result = command(*verify_arguments(inputs.load("llama_op23")))
    assert result.code == 0
    assert "46 tensors, of 40 values" in result.out
    assert "Nearest to what rounding may do" in result.out


def test_the_command_names_the_first_difference_and_saves_it(command: Command, tmp_path: Path) -> None:
    fixture = inputs.load("llama_op23")
    with planted("MatMul", wrong_sign, {"tp": 1}, "node_linear_3"):
        result = command(
            *verify_arguments(fixture, "--save", str(tmp_path / "wrong"), "--reduce", str(tmp_path / "small.onnx"))
        )
        again = command(
            "verify", str(tmp_path / "small.onnx"), "--tp", "2", "--allow-replicated", "--each", "-q",
            "--inputs", str(tmp_path / "small.npz"), "--save", str(tmp_path / "again"),
        )  # fmt: skip
    assert result.code == again.code == 6
    assert (
        "'linear_3' of node 'node_linear_3' on rank 0 and 1 (instruction 10, MatMul of 'node_linear_3', on rank 1)"
        in result.err
    )
    assert "ranks 0, 1, whose shares are added" in result.out
    assert "reduced to 1 of 103 nodes" in result.out
    saved = json.loads((tmp_path / "wrong" / "difference.json").read_text())
    assert saved["node"] == "node_linear_3"
    assert saved["suspects"][0]["rank"] == 1
    with np.load(tmp_path / "wrong" / "tensors.npz") as arrays:
        whole = arrays["rank0"] + arrays["rank1"]
        assert whole[tuple(saved["index"])] == pytest.approx(saved["ours"])
        assert arrays["reference"][tuple(saved["index"])] == pytest.approx(saved["reference"])
    onnx.checker.check_model(onnx.load(tmp_path / "wrong" / "nodes.onnx"))
