"""Two plans, or two devices, beside each other; and the smallest part of a model that fails."""

from __future__ import annotations

import inputs
import numpy as np
import pytest
from command import Command
from planted import off_by_one_row, planted, wrong_sign

import onnxmesh
from onnxmesh.compiler.errors import VerificationError
from onnxmesh.runtime.errors import RunError
from onnxmesh.verification import pairs
from onnxmesh.verification.each import Difference, examine
from onnxmesh.verification.model import Model
from onnxmesh.verification.pairs import Run, compare_runs
from onnxmesh.verification.reduce import options_of, reduce

FIXTURE = inputs.load("llama_op23")
FEEDS = FIXTURE.make_inputs()
MODEL = Model(FIXTURE.path)


def run(**mesh: int) -> Run:
    return Run(onnxmesh.compile(FIXTURE.path, **mesh, dims=FIXTURE.bindings()), name=str(mesh))


def test_two_plans_of_a_model_agree_in_all_tensors_that_both_hold() -> None:
    found = compare_runs(run(tp=2), run(cp=2), FEEDS, model=MODEL)
    found.check()
    names = [row.name for row in found.outputs]
    assert {"mul_319", "mul_332", "logits"} <= set(names)
    assert names.index("mul_319") < names.index("mul_332") < names.index("logits")
    assert found.reference == "{'cp': 2}"


def test_a_run_that_is_ahead_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "AHEAD", 0)
    assert len(compare_runs(run(tp=2), run(), FEEDS, model=MODEL).outputs) > 20


def test_a_wrong_plan_differs_from_the_first_wrong_tensor_on() -> None:
    right = run(cp=2)
    with planted("Fused", off_by_one_row, {"cp": 0, "tp": 0}, "node_mul_332"):
        found = compare_runs(run(tp=2), right, FEEDS, model=MODEL)
    wrong = [row.name for row in found.outputs if not row.agrees]
    assert wrong[0] == "mul_332"
    with pytest.raises(VerificationError, match="outputs differ from"):
        found.check()


def test_a_failing_run_ends_the_other() -> None:
    def fail(x: np.ndarray) -> np.ndarray:
        raise ValueError("it broke")

    with planted("RMSNormalization", fail, {"tp": 1}), pytest.raises(RunError, match="it broke"):
        compare_runs(run(tp=2), run(), FEEDS, model=MODEL)


def test_the_command_compares_two_plans(command: Command, tmp_path: object) -> None:
    for name, mesh in (("a", {"tp": 2}), ("b", {"cp": 2})):
        run(**mesh).plan.save(f"{tmp_path}/{name}.plan", weights=name == "a")
    result = command(
        "verify", str(FIXTURE.path), "--plan", f"{tmp_path}/a.plan", "--plan2", f"{tmp_path}/b.plan", "--each"
    )
    assert result.code == 0
    assert "mul_332" in result.out
    assert f"compared with {tmp_path}/b.plan" in result.out


# --- the smallest part --------------------------------------------------------------------------------------


def first_difference(mesh: Run) -> Difference:
    return examine(mesh.plan, MODEL, FEEDS).differences[0]


def test_a_wrong_product_is_reduced_to_one_node() -> None:
    sharded = run(tp=2)
    with planted("MatMul", wrong_sign, {"tp": 1}):
        found = reduce(MODEL, options_of(sharded.plan), FEEDS, first_difference(sharded))
    assert [node.op_type for node in found.proto.graph.node] == ["MatMul"]
    assert list(found.inputs) == ["mul_82"]
    assert found.trials <= 10


def test_what_fails_only_together_stays_together() -> None:
    """A fused kernel is wrong: its nodes alone are other kernels."""
    sharded = run(tp=2)
    with planted("FusedNorm", off_by_one_row, {"tp": 1}, "node_RMSNormalization_355"):
        found = reduce(MODEL, options_of(sharded.plan), FEEDS, first_difference(sharded))
    assert {node.op_type for node in found.proto.graph.node} == {"Add", "RMSNormalization"}


def test_what_never_fails_alone_is_said() -> None:
    sharded = run(tp=2)
    with planted("FusedNorm", off_by_one_row, {"tp": 1}, "node_RMSNormalization_355"):
        difference = first_difference(sharded)
    with pytest.raises(VerificationError, match="no part of the model fails by itself"):
        reduce(MODEL, options_of(sharded.plan), FEEDS, difference)
