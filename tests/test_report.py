"""The report: its numbers, its reasons, and that docs/report.md names every field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inputs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxmesh
from onnxmesh.compiler.api import compile_model
from onnxmesh.compiler.options import Options
from onnxmesh.compiler.report_text import placements_text, report_text, table
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Collective

DOCUMENT = Path(__file__).parents[1] / "docs" / "report.md"
KEYED = ("mesh", "options.dims", "options.shapes", "options.values", "placement")
"""Objects whose keys are names."""


def report(name: str, **options: Any) -> dict[str, Any]:
    fixture = inputs.load(name)
    return dict(onnxmesh.compile(fixture.path, dims=fixture.bindings(), **options).report)


def fields(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all leaves, as the document writes them."""
    if isinstance(value, dict):
        for key, item in value.items():
            name = "*" if path.endswith(KEYED) else key
            yield from fields(item, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from fields(item, f"{path}[]")
    else:
        yield path


def test_the_document_names_every_field_and_no_other() -> None:
    _, _, sections = DOCUMENT.read_text().partition("\n## ")
    rows = [line.split("|")[1] for line in sections.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    fixture = inputs.load("llama_h6_op18")
    shapes = fixture.shapes()
    found = set(fields(dict(onnxmesh.compile(fixture.path, tp=4, cp=2, shapes=shapes).report)))
    for name, options in (
        ("flux_op23", {"cp": 2}),
        ("llama_op23", {"dp": 2}),
        ("bert_ts17", {"tp": 2}),
        ("mixtral_op18", {"precision": "bf16"}),
    ):
        found |= set(fields(report(name, **options)))
    axes = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[4] x, int64[1] axes) => (float[N] y) {y = ReduceSum(x, axes)}'
    )
    found |= set(fields(dict(onnxmesh.compile(axes, values={"axes": [0]}).report)))
    text = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 20]> g (string[2] a, string[2] b) => (string[2] y) {y = StringConcat(a, b)}'
    )
    found |= set(fields(dict(onnxmesh.compile(text).report)))
    assert found == documented


def test_equal_compiles_give_equal_reports() -> None:
    first, second = (json.dumps(report("gpt2_op18", tp=2, cp=2)) for _ in range(2))
    assert first == second


def test_shares_of_tensor_parallelism() -> None:
    (axis,) = (found := report("llama_op23", tp=4))["axes"]
    assert (axis["axis"], axis["ranks"]) == ("tp", 4)
    assert axis["flops_sharded"] == 1
    assert axis["flops_per_rank"] == 0.25
    assert axis["linear_weight_bytes_sharded"] == 1
    assert axis["linear_weight_bytes_per_rank"] == 0.25
    assert found["rank"]["flops_share"] == 0.25
    assert 0.25 < found["rank"]["weight_share"] < 0.27


def test_shares_of_context_parallelism() -> None:
    (axis,) = (found := report("llama_op23", cp=2))["axes"]
    assert axis["flops_per_rank"] == 0.5
    assert axis["linear_weight_bytes_sharded"] == 0
    assert found["rank"]["weight_share"] >= 1


def test_shares_of_two_axes_multiply() -> None:
    found = report("llama_op23", tp=2, cp=2)
    assert [axis["axis"] for axis in found["axes"]] == ["cp", "tp"]
    assert found["rank"]["flops_share"] == 0.25


def test_one_rank_needs_no_axes() -> None:
    found = report("llama_op23")
    assert found["axes"] == found["collectives"] == found["warnings"] == []
    assert found["rank"]["weight_share"] == found["rank"]["flops_share"] == 1
    assert found["time"]["total_us"] == pytest.approx(found["time"]["one_device_us"], rel=0.01)
    assert "one rank" in report_text(found)


@pytest.mark.parametrize("strategy", ["allgather", "ulysses", "ring"])
def test_strategies_of_self_attention(strategy: str) -> None:
    found = report("llama_op23", cp=2, cp_strategy=strategy)
    assert [a["strategy"] for a in found["attention"]] == [strategy] * 2
    assert all(a["self_attention"] for a in found["attention"])
    kinds = {c["kind"] for c in found["collectives"] if c["tensor"] != "logits"}
    assert kinds == {"allgather": {"AllGather"}, "ulysses": {"AllToAll"}, "ring": {"Shift"}}[strategy]


def test_collectives_are_those_of_the_plan() -> None:
    fixture = inputs.load("llama_op23")
    plan = onnxmesh.compile(fixture.path, tp=2, cp=2, dims=fixture.bindings())
    program = plan.programs[0]
    sent = [i for i, item in enumerate(program.instructions) if isinstance(item, Collective)]
    found = plan.report["collectives"]
    assert [c["instruction"] for c in found] == sent
    assert all(c["bytes"] > 0 and c["tensor"] and c["node"] and c["reason"] for c in found)
    reduced = next(c for c in found if c["kind"] == "AllReduce")
    assert reduced["bytes"] == 2 * 8 * 64 * 4  # [2, 8, 64] in float32, each half of it twice
    assert reduced["reason"] == "P -> R"
    last = found[-1]
    assert (last["kind"], last["axis"], last["tensor"]) == ("AllGather", "cp", "logits")
    assert last["bytes"] == 2 * 8 * 96 * 4
    assert sum(a["bytes_sent"] for a in plan.report["axes"]) == sum(c["bytes"] for c in found)


def test_memory_is_that_of_the_plan() -> None:
    fixture = inputs.load("gpt2_op18")
    plan = onnxmesh.compile(fixture.path, tp=4, dims=fixture.bindings())
    assert plan.report["rank"]["activation_bytes"] == plan.programs[0].arena_bytes
    weights = [b for b in plan.programs[0].buffers if b.kind == "weight"]
    bytes_of_weights = sum(int(np.prod(b.shape)) * 4 for b in weights if b.dtype == "float32")
    assert plan.report["rank"]["weight_bytes"] >= bytes_of_weights


def test_heads_that_do_not_divide_are_explained() -> None:
    found = report("llama_h6_op23", tp=4)
    reasons = {entry["reason"] for entry in found["uneven"] if entry["what"] == "q"}
    assert reasons == {"6 q heads on 4 ranks: 6 in 2 parts, each on 2 ranks"}
    assert "2 k and v heads on 4 ranks" in str([entry["reason"] for entry in found["uneven"]])
    assert "6 q heads" in report_text(found).replace("\n", " ")


def test_times_hide_what_runs_beside_computation() -> None:
    time = report("llama_op23", cp=2, cp_strategy="ring")["time"]
    assert time["hidden_us"] > 0
    together = time["compute_us"] + time["communication_us"] - time["hidden_us"]
    assert time["total_us"] == pytest.approx(together, abs=0.002)
    assert report("llama_op23")["time"]["hidden_us"] == 0


def test_a_warning_where_one_device_is_faster() -> None:
    assert "predicted slower than one device" in report("llama_op23", tp=4)["warnings"][0]["reason"]
    assert report("llama_op23", tp=4)["warnings"][0]["reason"] in " ".join(
        report_text(report("llama_op23", tp=4)).split()
    )


def odd_model(op: str) -> onnx.ModelProto:
    """Two large MatMuls around an op, which no rule may know."""
    w = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
            helper.make_node(op, ["a"], ["b"], name="middle"),
            helper.make_node("MatMul", ["b", "w"], ["y"], name="second"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
        [w],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_replicated_node_has_a_reason_and_a_cost() -> None:
    found = dict(onnxmesh.compile(odd_model("Hardmax"), tp=2).report)
    entries = {entry["node"]: entry for entry in found["replicated"]}
    assert "middle" in entries
    assert entries["middle"]["reason"]
    assert entries["middle"]["microseconds"] > 0
    assert 0 < entries["middle"]["share"] < 1


def test_weights_that_cannot_be_cut_say_so() -> None:
    found = report("mlp_op18", tp=64, allow_replicated=True)
    reasons = {entry["reason"] for entry in found["replicated"]}
    assert reasons
    assert all(reasons)


def test_seconds_of_the_passes_are_not_in_the_report() -> None:
    fixture = inputs.load("mlp_op18")
    compilation = compile_model(fixture.path, Options(Mesh.of(tp=2), dims=fixture.bindings()))
    assert set(compilation.seconds) >= {"load", "shard-tp", "lower"}


@pytest.mark.parametrize("name", ["llama_op23", "flux_op23", "bert_ts17", "whisper_op18"])
def test_text_fits_and_says_everything(name: str) -> None:
    found = report(name, tp=2)
    for text in (report_text(found), report_text(found, full=True), placements_text(found, full=True)):
        assert max(map(len, text.splitlines())) <= 100
    for name in (entry["name"] for entry in (*found["inputs"], *found["outputs"])):
        assert name[:8] in placements_text(found)


def test_tables_shorten_names_and_wrap_reasons() -> None:
    text = table(["name", "why"], [["n" * 90, "word " * 30], ["b", "c"], ["d", "e"]], limit=2)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("word") == 30
    assert text.endswith("... and 1 more")
