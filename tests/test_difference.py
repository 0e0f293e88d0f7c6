"""How two plans differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Command, check_failure

import onnxmesh
from onnxmesh.inspection.difference import difference
from onnxmesh.models import catalogue


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return catalogue.save("demo", tmp_path_factory.mktemp("models") / "demo.onnx")


def test_two_compiles_of_one_model_do_the_same(model: Path) -> None:
    found = difference(onnxmesh.compile(model, tp=2), onnxmesh.compile(model, tp=2))
    assert not found
    assert all(not value for name, value in found.to_json().items() if name != "format")


def test_another_strategy_differs_in_what_is_sent_and_how_attention_runs(model: Path) -> None:
    ring, ulysses = (onnxmesh.compile(model, cp=2, cp_strategy=name) for name in ("ring", "ulysses"))  # type: ignore[arg-type]
    found = difference(ring, ulysses)
    assert found.setting == {"cp_strategy": ("ring", "ulysses")}
    assert set(found.strategies.values()) == {("ring", "ulysses")}
    assert any("AllToAll" in name and change[0] is None for name, change in found.collectives.items())
    assert found.totals["sending"] == tuple(plan.report["time"]["communication_us"] for plan in (ring, ulysses))


def test_another_mesh_differs_in_the_placements_of_weights(model: Path) -> None:
    found = difference(onnxmesh.compile(model, tp=2), onnxmesh.compile(model, cp=2, cp_strategy="ring"))
    assert found.setting["tp"] == (2, 1)
    name = "weight model.embed_tokens.weight"
    assert found.placements[name][0].endswith("tp: S(1)")
    assert "tp" not in found.placements[name][1]


def test_the_command_ends_as_diff_does(model: Path, command: Command, tmp_path: Path) -> None:
    for name, options in (("a", ["--tp", 2]), ("b", ["--tp", 2]), ("c", ["--cp", 2])):
        command("compile", model, *options, "-q", "-o", tmp_path / f"{name}.plan")
    same = command("diff", tmp_path / "a.plan", tmp_path / "b.plan")
    assert (same.code, same.out) == (0, "a.plan and b.plan do the same\n")
    other = command("diff", tmp_path / "a.plan", tmp_path / "c.plan")
    assert other.code == 1
    assert "predicted time" in other.out
    found = command("diff", tmp_path / "a.plan", tmp_path / "c.plan", "--json")
    assert json.loads(found.out)["setting"]["tp"] == [2, 1]
    check_failure(command("diff", tmp_path / "a.plan", tmp_path / "none.plan"), 5, "none.plan")
