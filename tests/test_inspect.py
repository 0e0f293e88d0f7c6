"""`onnxmesh inspect` in a terminal: the summary, the views, one node, and JSON of each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import inputs
import pytest
from command import Command, check_failure, compile_fixture

import onnxmesh
from onnxmesh.cli_options import VIEWS
from onnxmesh.inspection import views
from onnxmesh.inspection.joined import Joined
from onnxmesh.inspection.lookup import look_up
from onnxmesh.inspection.summary import summary_text
from onnxmesh.inspection.views_text import view_text
from onnxmesh.runtime import text
from onnxmesh.runtime.errors import InvalidArgument, PlanError
from onnxmesh.runtime.report import Report
from onnxmesh.runtime.serialize import load

WIDTHS = (80, 100, 160)


@pytest.fixture(scope="module")
def llama() -> Joined:
    return joined("llama_op23", tp=2, cp=2, cp_strategy="ring")


@pytest.fixture
def folder(command: Command, tmp_path: Path) -> Path:
    return compile_fixture(command, "llama_op23", tmp_path / "llama.plan", "--tp", 2)


def joined(name: str, **options: Any) -> Joined:
    fixture = inputs.load(name)
    return Joined(onnxmesh.compile(fixture.path, dims=fixture.bindings(), **options))


def texts(plan: Joined) -> Iterator[str]:
    yield summary_text(plan, "a.plan")
    for full in (False, True):
        yield from (view_text(plan, what, full=full) for what in VIEWS)


# --- the summary --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama_op23", {"tp": 2, "cp": 2}),
        ("flux_op23", {"cp": 2, "tp": 2, "dp": 2}),
        ("bert_ts17", {"tp": 2}),
        ("whisper_op18", {"tp": 2}),
        ("mlp_op18", {}),
    ],
)
def test_the_summary_is_one_screen(name: str, options: dict[str, Any]) -> None:
    lines = summary_text(joined(name, **options), f"{name}.plan").splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 100


def test_the_summary_says_what_it_is_and_what_it_takes(command: Command, folder: Path) -> None:
    out = command("inspect", folder).out
    report = load(folder).report
    assert out.startswith("llama.plan: tp=2, 2 ranks, attention by heads on tp")
    for part in (
        text.micros(report["time"]["total_us"]),
        text.size(report["rank"]["device_bytes"]),
        "AllReduce",
        "OM2110",
        "warning[OM2501]: 2 ranks are predicted slower",
        "input_ids",
        "--what tensors",
    ):
        assert part in out


def test_a_plan_of_one_rank_sends_nothing() -> None:
    out = summary_text(joined("mlp_op18"), "mlp.plan")
    assert out.startswith("mlp.plan: one rank")
    assert "Nothing is sent" in out


# --- the views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux_op23", "bert_ts17", "whisper_op18"])
def test_every_view_fits(name: str) -> None:
    for shown in texts(joined(name, tp=2)):
        assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("width", WIDTHS)
def test_views_are_as_wide_as_the_terminal(llama: Joined, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "columns", lambda: width)
    widest = max(len(line) for shown in texts(llama) for line in shown.splitlines() if "  " in line)
    assert widest <= width


def test_all_views_are_offered() -> None:
    assert tuple(views.VIEWS) == VIEWS


def test_tensors_say_where_they_lie_and_who_needs_them(llama: Joined) -> None:
    entries = views.tensors(llama)
    assert [entry["name"] for entry in entries if entry["role"] == "input"] == [
        entry["name"] for entry in llama.report["inputs"]
    ]
    product = next(entry for entry in entries if entry["name"] == "linear_3")
    assert product["placement"] == {"cp": "S(1)", "tp": "P"}
    assert (product["shape"], product["local_shape"]) == ([2, 16, 64], [2, 8, 64])
    (maker,) = product["made_by"]
    assert llama.instructions[maker]["kernel"] == "MatMul"
    assert [llama.instructions[reader]["kernel"] for reader in product["read_by"]] == ["AllReduce"]


def test_makers_come_before_readers(llama: Joined) -> None:
    for entry in views.tensors(llama):
        assert all(maker < reader for maker in entry["made_by"] for reader in entry["read_by"])


def test_collectives_add_up(llama: Joined) -> None:
    entries = views.collectives(llama)
    assert sum(entry["bytes"] for entry in entries) == sum(axis["bytes_sent"] for axis in llama.report["axes"])
    shown = view_text(llama, "collectives")
    assert f"{len(entries)} collectives" in shown
    assert "In the order of the program" in view_text(llama, "collectives", full=True)


def test_memory_is_what_the_arena_holds(llama: Joined) -> None:
    found = views.memory(llama)
    peak = found["peak"]
    assert peak["bytes"] == max(found["alive_bytes"]) == found["alive_bytes"][peak["instruction"]]
    assert sum(entry["bytes"] for entry in peak["alive"]) == peak["bytes"] <= llama.program.arena_bytes
    assert all(entry["first"] <= peak["instruction"] <= entry["last"] for entry in peak["alive"])
    spans = sorted((entry["offset"], entry["offset"] + entry["bytes"]) for entry in peak["alive"])
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_weights_name_their_readers(llama: Joined) -> None:
    for entry in views.weights(llama):
        assert entry["read_by"]
        assert all(
            entry["name"] in [tensor["name"] for tensor in llama.instructions[at]["reads"]] for at in entry["read_by"]
        )


def test_missed_patterns_have_their_code(llama: Joined) -> None:
    assert re.search(r"OM3502 +Fused linear layer", view_text(llama, "patterns"))


def test_passes_say_what_they_did(llama: Joined) -> None:
    done = {entry["stage"]: entry["did"] for entry in views.passes(llama)}
    assert done["bind"] == "batch = 2, seq = 16"
    assert "Attention 2" in done["recognise"]
    assert f"{len(llama.program.instructions)} instructions" in done["lower"]
    assert list(done) == [stage for stage in STAGES if stage in done]


STAGES = (
    "load", "bind", "normalise", "recognise", "precision", "shard-dp", "shard-cp", "shard-tp",
    "merge", "fuse", "layout", "schedule", "group", "lower",
)  # fmt: skip


def test_instructions_are_the_program(llama: Joined) -> None:
    entries = views.instructions(llama)
    assert [entry["instruction"] for entry in entries] == list(range(len(llama.program.instructions)))
    assert sum(entry["microseconds"] for entry in entries) == pytest.approx(
        sum(llama.report["time"]["instructions_us"])
    )
    shown = view_text(llama, "instructions", full=True)
    assert all(f"  #{entry['instruction']} " in shown for entry in entries)


@pytest.mark.parametrize("what", VIEWS)
def test_a_view_as_json(command: Command, folder: Path, what: str) -> None:
    assert command("inspect", folder, "--what", what, "--json").json == views.VIEWS[what](Joined(load(folder)))


def test_the_whole_report_as_json(command: Command, folder: Path) -> None:
    assert command("inspect", folder, "--json").json == load(folder).report


# --- one name -----------------------------------------------------------------------------------------------


def test_a_node(llama: Joined, command: Command, folder: Path) -> None:
    found = look_up(llama, "node_linear_3")
    assert found["is"] == "node"
    assert [entry["kernel"] for entry in found["instructions"]] == ["MatMul"]
    assert {decision["axis"]: decision["chosen"]["factor"] for decision in found["decisions"]} == {"cp": "m", "tp": "k"}
    assert [(entry["kind"], entry["where"]) for entry in found["collectives"]] == [("AllReduce", "after")]
    assert [entry["code"] for entry in found["patterns"]] == ["OM3502"]
    out = command("inspect", folder, "--node", "node_linear_3").out
    for part in ("node_linear_3: a node of the model", "S(0)", "Why so on tp: MatMul", "chosen", "AllReduce", "OM3502"):
        assert part in out


def test_a_node_that_fusion_took_in_leads_to_its_instruction(llama: Joined) -> None:
    (entry,) = look_up(llama, "node_linear_1")["instructions"]
    assert entry["nodes"] == ["node_linear", "node_linear_1", "node_linear_2"]


def test_a_weight(llama: Joined) -> None:
    found = look_up(llama, "val_43+val_50+val_57")
    assert (found["is"], found["sources"]) == ("weight", ["val_43", "val_50", "val_57"])
    assert found["weight"]["local_shape"] == [64, 64]


def test_an_output_is_every_tensor_of_its_name(llama: Joined) -> None:
    found = look_up(llama, "logits")
    assert found["is"] == "output"
    assert [tensor["placement"] for tensor in found["tensors"]] == [
        {"cp": "S(1)", "tp": "S(2)"},
        {"cp": "S(1)", "tp": "R"},
        {"cp": "R", "tp": "R"},
    ]


def test_an_instruction(llama: Joined) -> None:
    found = look_up(llama, "#13")
    assert (found["is"], [entry["instruction"] for entry in found["instructions"]]) == ("instruction", [13])


def test_part_of_a_name_will_do_if_it_is_of_one(llama: Joined) -> None:
    assert look_up(llama, "NODE_LINEAR_14")["name"] == "node_linear_14"
    assert look_up(llama, "pos~76")["name"] == "q_pos~76"


def test_a_misspelt_name_is_answered_by_those_like_it(command: Command, folder: Path) -> None:
    done = command("inspect", folder, "--node", "node_linaer_3")
    check_failure(done, 7, "error[OM5012]: the plan has no node and no tensor 'node_linaer_3'", "node_linear_3")
    check_failure(command("inspect", folder, "--node", "scaled"), 7, "names hold 'scaled'", "did you mean")


def test_what_nothing_is_like_is_answered_without_suggestions(llama: Joined) -> None:
    with pytest.raises(InvalidArgument) as caught:
        look_up(llama, "Ω")
    assert "--what instructions" in caught.value.hint


def test_every_name_of_the_plan_can_be_looked_up(llama: Joined) -> None:
    nodes = {node for entry in llama.instructions for node in entry["nodes"]}
    names = {entry["name"] for entry in (*views.weights(llama), *views.tensors(llama))} - {""}
    for name in nodes | names:
        assert look_up(llama, name)["instructions"], name


def test_a_node_as_json(command: Command, folder: Path) -> None:
    assert command("inspect", folder, "--node", "node_linear_3", "--json").json == look_up(
        Joined(load(folder)), "node_linear_3"
    )


def test_a_view_and_a_node_at_once(command: Command, folder: Path) -> None:
    check_failure(command("inspect", folder, "--what", "memory", "--node", "x"), 2, "either --what or --node")


def test_a_plan_without_a_report(llama: Joined) -> None:
    with pytest.raises(PlanError, match="no report"):
        Joined(replace(llama.plan, report={}))


def test_a_report_of_before_there_were_codes(llama: Joined) -> None:
    """Of format 1: warnings were text, reasons had no codes, and less was said of instructions."""
    old = Report(json.loads(json.dumps(llama.report)))
    old["warnings"] = [entry["reason"] for entry in old["warnings"]]
    for section in ("replicated", "fallback", "uneven", "patterns"):
        for entry in old[section]:
            del entry["code"]
    for section in ("instructions", "tensors", "decisions", "trace"):
        del old[section]
    plan = Joined(replace(llama.plan, report=old))
    assert "warning: 4 ranks are predicted slower" in summary_text(plan, "a.plan")
    assert all(texts(plan))
    assert look_up(plan, "node_linear_3")["instructions"]


# --- terminals ----------------------------------------------------------------------------------------------


def test_what_is_piped_is_plain(command: Command, folder: Path) -> None:
    assert "\x1b" not in command("inspect", folder).out
