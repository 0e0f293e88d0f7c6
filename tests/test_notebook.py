"""How plans, sessions, choices and differences show themselves, and the report as tables of pandas."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from dataclasses import replace
from typing import Any

import inputs
import pytest

import onnxmesh
from onnxmesh.inspection.difference import difference
from onnxmesh.runtime.errors import InvalidArgument, RunError
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.report import Report


@pytest.fixture(scope="module")
def plan() -> Plan:
    fixture = inputs.load("llama_op23")
    return onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings())


def shown(thing: Any) -> tuple[str, str]:
    line, page = repr(thing), thing._repr_html_()
    assert "\n" not in line and len(line) <= 162
    assert page.startswith("<table>") and len(page) < 3000
    return line, page


def test_a_plan_is_one_line(plan: Plan) -> None:
    line, page = shown(plan)
    count = len(plan.programs[0].instructions)
    assert line.startswith(f"<Plan for tp=2: instructions {count}, weights {len(plan.weights)}")
    assert "<caption>Plan for tp=2</caption>" in page
    assert "<th>inputs</th><td>input_ids attention_mask position_ids</td>" in page


def test_names_are_no_markup(plan: Plan) -> None:
    program = plan.programs[0]
    port = replace(program.inputs[0], name="<script>alert(1)</script>")
    page = replace(plan, programs=(replace(program, inputs=(port,)),))._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_long_names_are_cut(plan: Plan) -> None:
    program = plan.programs[0]
    shown(replace(plan, programs=(replace(program, inputs=(replace(program.inputs[0], name="n" * 5000),)),)))


def test_a_session_says_whether_it_is_open(plan: Plan) -> None:
    with onnxmesh.Session(plan) as session:
        assert shown(session)[0].startswith("<Session of tp=2 on cpu: open, inputs input_ids")
    assert repr(session).startswith("<Session of tp=2 on cpu: closed")


def test_a_choice_shows_its_estimates() -> None:
    fixture = inputs.load("mlp_op18")
    choice = onnxmesh.estimate(fixture.path, 4, dims=fixture.bindings())
    line, page = shown(choice)
    assert line.startswith("<Choice for 4 ranks: ")
    assert f"<th>{choice.best.candidate}</th>" in page
    assert shown(choice.best)[0].startswith(f"<Estimate of {choice.best.candidate}: ")


def test_a_difference_counts(plan: Plan) -> None:
    fixture = inputs.load("llama_op23")
    other = onnxmesh.compile(fixture.path, cp=2, dims=fixture.bindings())
    assert shown(difference(plan, other))[0].startswith("<Difference: setting 2, ")
    assert shown(difference(plan, plan))[0] == "<No difference>"


# --- the report ---------------------------------------------------------------------------------------------


def test_the_report_is_a_dict(plan: Plan) -> None:
    report = plan.report
    assert isinstance(report, Report)
    assert report == dict(report) == json.loads(json.dumps(report))
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report
    assert isinstance(pickle.loads(pickle.dumps(report)), Report)
    assert repr(report).startswith("<Report: axes 1, ")
    assert "<th>weights</th>" in report._repr_html_()
    assert repr(Report()) == "<Report: empty>"


def test_every_list_is_a_table(plan: Plan) -> None:
    pytest.importorskip("pandas")
    assert {"weights", "collectives", "instructions", "replicated", "patterns"} <= set(plan.report.tables)
    for name in plan.report.tables:
        assert len(plan.report.to_pandas(name)) == len(plan.report[name]), name


def test_weights_as_a_table(plan: Plan) -> None:
    pytest.importorskip("pandas")
    table = plan.report.to_pandas()
    assert {"name", "shape", "local_bytes", "placement.tp"} <= set(table.columns)
    assert table["local_bytes"].sum() == plan.report["rank"]["weight_bytes"]


def test_instructions_have_their_times(plan: Plan) -> None:
    pytest.importorskip("pandas")
    table = plan.report.to_pandas("instructions")
    assert list(table["microseconds"]) == plan.report["time"]["instructions_us"]
    assert list(table["instruction"]) == list(range(len(table)))


def test_a_table_that_is_none(plan: Plan) -> None:
    with pytest.raises(InvalidArgument, match="no table 'time'") as caught:
        plan.report.to_pandas("time")
    assert "weights" in caught.value.hint
    assert caught.value.code == "OM5013"


def test_without_pandas(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RunError, match="need pandas") as caught:
        plan.report.to_pandas()
    assert caught.value.hint == "pip install pandas"
