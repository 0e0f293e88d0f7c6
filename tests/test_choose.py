"""Choosing a mesh: what is compared, what is best, and what is out of the question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Command, check_failure

import onnxmesh
from onnxmesh.compiler import api
from onnxmesh.compiler.choose import Candidate, candidates
from onnxmesh.compiler.errors import ShardingError
from onnxmesh.compiler.options import Options
from onnxmesh.models import catalogue
from onnxmesh.runtime.mesh import Mesh


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return catalogue.save("demo", tmp_path_factory.mktemp("models") / "demo.onnx")


def test_every_division_is_a_candidate_with_every_strategy() -> None:
    found = list(candidates(4))
    assert len(set(found)) == len(found)
    assert {c.mesh for c in found} == {
        Mesh.of(tp=t, cp=c, dp=4 // t // c) for t in (1, 2, 4) for c in (1, 2, 4) if t * c <= 4
    }
    assert {c.cp_strategy for c in found if c.mesh.axis_size("cp") > 1} == {"allgather", "ulysses", "ring"}
    assert {c.cp_strategy for c in found if c.mesh.axis_size("cp") == 1} == {"auto"}
    assert str(Candidate(Mesh.of(tp=2, cp=4), "ring")) == "cp=4 x tp=2 ring"


def test_what_is_begun_once_ends_as_a_compile_of_its_own(model: Path) -> None:
    begun = api.begin(model, Options(Mesh.of()))
    for mesh, strategy in ((Mesh.of(tp=2), "auto"), (Mesh.of(cp=2), "ring"), (Mesh.of(tp=2, cp=2), "ulysses")):
        options = Options(mesh, cp_strategy=strategy)  # type: ignore[arg-type]
        plan, alone = api.finish(begun, options).plan, api.compile_model(model, options).plan
        assert plan is not None and alone is not None
        assert plan == alone
        assert plan.report == alone.report


def test_the_best_is_the_fastest_and_its_arguments_compile_it(model: Path) -> None:
    choice = onnxmesh.estimate(model, ranks=2)
    fit = [item for item in choice.estimates if not item.reason]
    assert [item.total_us for item in fit] == sorted(item.total_us for item in fit)
    assert choice.best is fit[0]
    plan = onnxmesh.compile(model, **choice.best.candidate.arguments)
    assert plan.report["time"]["total_us"] == choice.best.total_us
    assert plan.report["rank"]["device_bytes"] == choice.best.device_bytes


def test_processes_find_the_same(model: Path) -> None:
    assert onnxmesh.estimate(model, ranks=2, jobs=2) == onnxmesh.estimate(model, ranks=2)


def test_one_rank_is_compared_with_nothing(model: Path) -> None:
    choice = onnxmesh.estimate(model, ranks=1)
    assert choice.best is choice.alone
    assert choice.warning == ""


def test_ranks_that_do_not_pay_are_warned_of(model: Path) -> None:
    choice = onnxmesh.estimate(model, ranks=2)  # a tiny model
    assert choice.alone.total_us < choice.best.total_us
    assert "2 ranks are predicted slower than one" in choice.warning


def test_too_little_memory_puts_a_division_out_of_the_question(model: Path) -> None:
    bytes_needed = {item.candidate: item.device_bytes for item in onnxmesh.estimate(model, ranks=2).estimates}
    limit = (min(bytes_needed.values()) + max(bytes_needed.values())) / 2
    choice = onnxmesh.estimate(model, ranks=2, memory_per_rank=limit)
    assert {item.candidate for item in choice.estimates if item.reason} == {
        candidate for candidate, needed in bytes_needed.items() if needed > limit
    }
    assert choice.best.device_bytes <= limit
    with pytest.raises(
        ShardingError, match=r"no division of 2 ranks will do: .*a rank needs 6\d\.\d MiB, it has 1\.0 MiB"
    ):
        _ = onnxmesh.estimate(model, ranks=2, memory_per_rank=1 << 20).best


def test_a_division_that_cannot_be_says_why(model: Path) -> None:
    choice = onnxmesh.estimate(model, ranks=3)  # nothing of it divides by 3
    assert all(item.reason for item in choice.estimates if item.total_us == float("inf"))
    assert choice.to_json()["one_rank"]["total_us"] == choice.alone.total_us


def test_estimate_prints_a_table_or_json(model: Path, command: Command) -> None:
    text = command("estimate", model, "--ranks", 2, "--memory-per-rank", "80G", "-q").out
    assert "1 rank" in text
    small = command("estimate", model, "--ranks", 2, "--memory-per-rank", "64.3M", "-q").out
    assert "1 rank a rank needs 64.4 MiB, it has 64.3 MiB" in " ".join(small.split())
    assert "tp=2" in text
    found = json.loads(command("estimate", model, "--ranks", 2, "--json").out)
    assert [item["mesh"] for item in found["estimates"]] != []
    check_failure(command("estimate", model), 2, "give --ranks")


def test_compile_auto_takes_the_best(model: Path, command: Command, tmp_path: Path) -> None:
    best = onnxmesh.estimate(model, ranks=2).best.candidate
    command("compile", model, "--auto", "--ranks", 2, "-q", "-o", tmp_path / "x.plan")
    assert onnxmesh.load(tmp_path / "x.plan").mesh == best.mesh
    check_failure(command("compile", model, "--ranks", 2), 2, "--auto goes with --ranks")
    check_failure(command("compile", model, "--auto", "--ranks", 2, "--tp", 2), 2, "leave out --tp")
