"""Where the report says that things come from: nodes, modules, tensors, and why they were placed so."""

from __future__ import annotations

from typing import Any

import inputs
import onnx
import pytest
from onnx import helper

import onnxmesh
from onnxmesh.compiler.modules import SCOPES, module_of
from onnxmesh.runtime.plan import Plan


def plan_of(name: str, **options: Any) -> Plan:
    fixture = inputs.load(name)
    return onnxmesh.compile(fixture.path, dims=fixture.bindings(), **options)


def test_every_instruction_names_nodes_of_the_model() -> None:
    plan = plan_of("llama_op18", tp=2)
    names = {node.name for node in onnx.load(inputs.load("llama_op18").path, load_external_data=False).graph.node}
    entries = plan.report["instructions"]
    assert len(entries) == len(plan.programs[0].instructions)
    assert {name for entry in entries for name in entry["nodes"]} <= names
    assert all(entry["nodes"] for entry in entries)


def test_what_a_fused_instruction_does_the_work_of() -> None:
    plan = plan_of("llama_op23", tp=2)
    fused = [
        entry
        for item, entry in zip(plan.programs[0].instructions, plan.report["instructions"])
        if getattr(item, "kernel", "") == "FusedNorm"
    ]
    assert any(len(entry["nodes"]) > 1 for entry in fused)


def test_modules_come_from_weights_where_nothing_else_says_them() -> None:
    modules = {entry["module"] for entry in plan_of("llama_op23", tp=2).report["instructions"]}
    assert {"module.model.embed_tokens", "module.model.layers.1.input_layernorm"} <= modules


def test_modules_come_from_names() -> None:
    modules = {entry["module"] for entry in plan_of("gpt2_ts17", tp=2).report["instructions"]}
    assert any(module.endswith("transformer.h.1.attn.c_attn") for module in modules)


def test_modules_come_from_metadata() -> None:
    node = helper.make_node("MatMul", ["x", "x"], ["y"], name="product")
    node.metadata_props.add(key=SCOPES, value="['', 'model', 'model.layers.3', 'matmul']")
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64, 64]) for name in "xy")
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), ir_version=10)
    (entry,) = onnxmesh.compile(model).report["instructions"]
    assert (entry["nodes"], entry["module"]) == (["product"], "model.layers.3")


def test_weights_of_one_instruction_name_what_they_share() -> None:
    assert module_of([], [["h.3.attn.to_q.weight", "h.3.attn.to_k.weight"]], {}) == "h.3.attn"
    assert module_of([], [["weight"], ["h.3.norm.weight"]], {}) == "h.3.norm"
    assert module_of(["node"], [["h.3.norm.weight"]], {"node": "h.4"}) == "h.4"
    assert module_of(["node"], [], {}) == ""


def test_tensors_have_their_global_view() -> None:
    plan = plan_of("llama_op23", tp=2, cp=2)
    buffers = plan.programs[0].buffers
    known = plan.report["tensors"]
    assert any(entry["placement"] == {"cp": "S(1)", "tp": "S(2)"} for entry in known)
    for entry in known:
        if not entry["piece"] and not any(cut.startswith("S") for cut in entry["placement"].values()):
            assert tuple(entry["shape"]) == buffers[entry["buffer"]].shape


def test_what_an_algorithm_makes_on_the_way_has_no_global_view() -> None:
    plan = plan_of("llama_op23", cp=2, tp=2, cp_strategy="ring")
    known = {entry["buffer"] for entry in plan.report["tensors"]}
    steps = [item for item in plan.programs[0].instructions if getattr(item, "kernel", "") == "AttentionBlock"]
    assert steps
    assert not any(buffer in known for item in steps for buffer in item.outs)


def test_merged_products_know_their_global_view() -> None:
    entries = plan_of("llama_op23", tp=2).report["tensors"]
    (merged, *_) = [entry for entry in entries if entry["name"].count("+") == 2]
    assert merged["placement"]["tp"].startswith("S(2; ")


def test_a_decision_has_alternatives_with_their_cost() -> None:
    report = plan_of("llama_op23", tp=2).report
    used = {number for entry in report["instructions"] for number in entry["decisions"]}
    assert used == set(range(len(report["decisions"])))
    product = next(own for own in report["decisions"] if own["op"] == "MatMul" and own["chosen"]["factor"] == "k")
    assert product["chosen"]["placement"] == "S(2), S(0) -> P"
    assert product["chosen"]["moving_us"] > 0
    others = {other["factor"]: other for other in product["alternatives"]}
    assert others["n"]["allowed"]
    assert not others["replicate"]["allowed"]
    assert others["replicate"]["computing_us"] > 0


@pytest.mark.parametrize(("strategy", "factor"), [("allgather", "s"), ("ulysses", "h"), ("ring", "t")])
def test_a_demanded_strategy_excludes_the_others(strategy: str, factor: str) -> None:
    decisions = plan_of("llama_op23", cp=2, cp_strategy=strategy).report["decisions"]
    for own in (own for own in decisions if own["op"] == "Attention"):
        assert own["chosen"]["factor"] == factor
        assert own["alternatives"]
        assert not any(other["allowed"] for other in own["alternatives"])


def test_each_axis_has_decisions_of_its_own() -> None:
    report = plan_of("llama_op23", tp=2, cp=2).report
    for entry in report["instructions"]:
        axes = {report["decisions"][number]["axis"] for number in entry["decisions"]}
        assert axes <= {"cp", "tp"}
    assert any(len(entry["decisions"]) > 1 for entry in report["instructions"])
