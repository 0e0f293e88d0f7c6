"""Benchmarks on the CPU: their result, their text, and what the command line makes of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inputs
import numpy as np
import pytest
from command import Command, check_failure, compile_fixture

import onnxmesh
from onnxmesh.runtime import bench as benchmarks
from onnxmesh.runtime import timeline
from onnxmesh.runtime.bench import Request, bench
from onnxmesh.runtime.bench_rank import Work
from onnxmesh.runtime.bench_text import bench_text
from onnxmesh.runtime.cuda import ranks
from onnxmesh.runtime.engine import InstructionTime
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.serialize import load

DOCUMENT = Path(__file__).parents[1] / "docs" / "bench.md"
WORK = Work(runs=3, warmup=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan on two ranks."""
    fixture, target = inputs.load("llama_op23"), tmp_path_factory.mktemp("bench") / "llama.plan"
    onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings()).save(target)
    return target


def fields(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all leaves, as the document writes them."""
    if isinstance(value, dict):
        for key, item in value.items():
            name = "*" if path in ("mesh", "memory.per_rank[].by_kind") else key
            yield from fields(item, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and value:
        yield from fields(value[0], f"{path}[]")
    else:
        yield f"{path}[]" if isinstance(value, list) else path


def gpu_rank(plan: Plan, factor: float) -> dict[str, Any]:
    """What a rank on a GPU could have measured: everything takes 10 us times `factor`."""
    count = len(plan.programs[0].instructions)
    times = [InstructionTime(i, 10 * factor * i, 10 * factor * (i + 1)) for i in range(count)]
    return {
        "latencies_us": [100.0 * factor, 110.0 * factor, 120.0 * factor],
        "back_to_back_us": 90.0 * factor,
        "timeline": timeline.to_json(times),
        "memory": {"weights": 1000, "arena": 500, "inputs": 10, "workspace": 100},
        "allocated_bytes": 2048,
        "graph": {"captured": True, "not_captured": ["a reason"], "generic": ["instruction 0, Gather of node 'x'"]},
        "device": "NVIDIA H200",
    }


def gpu_result(folder: Path) -> dict[str, Any]:
    plan = load(folder)
    measured = [gpu_rank(plan, factor) for factor in (1.0, 1.5)]
    lines = timeline.aligned([timeline.from_json(own["timeline"]) for own in measured], plan.programs[0])
    return benchmarks.result(plan, Request(str(folder), WORK), measured, lines)


# --- results --------------------------------------------------------------------------------------------------


def test_a_benchmark_of_ranks_on_the_cpu(folder: Path) -> None:
    found = bench(Request(str(folder), WORK))
    assert found is not None
    json.dumps(found)
    assert (found["ranks"], found["device"], found["graph"], found["predicted"]) == (2, "cpu", None, None)
    latency = found["latency_us"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    plan = load(folder)
    assert sum(entry["count"] for entry in found["kernels"]) == len(plan.programs[0].instructions)
    for own in found["per_rank"]:
        parts = own["compute_us"] + own["communication_us"] + own["waiting_us"] - own["beside_us"] + own["idle_us"]
        assert parts == pytest.approx(own["total_us"], rel=0.01)
        assert own["waiting_us"] >= 0


def test_memory_by_kind_is_that_of_the_plan(folder: Path) -> None:
    found, plan = bench(Request(str(folder), WORK)), load(folder)
    assert found is not None
    for own in found["memory"]["per_rank"]:
        assert own["by_kind"]["weights"] == plan.report["rank"]["weight_bytes"]
        assert own["by_kind"]["arena"] == plan.programs[0].arena_bytes
        assert own["by_kind"]["inputs"] == plan.report["rank"]["input_bytes"]
    assert found["memory"]["predicted_bytes"] == plan.report["rank"]["device_bytes"]


def test_a_run_lasts_as_long_as_its_slowest_rank(folder: Path) -> None:
    found = gpu_result(folder)
    assert found["latency_us"]["p50"] == 165
    assert found["back_to_back_us"] == 135
    assert found["throughput"]["runs_per_s"] == pytest.approx(1e6 / 135, rel=1e-3)


def test_samples_and_tokens_are_the_first_dims_of_the_first_input(folder: Path) -> None:
    batch, length = load(folder).programs[0].inputs[0].shape[:2]
    rate = gpu_result(folder)["throughput"]
    assert rate["samples_per_s"] == pytest.approx(batch * rate["runs_per_s"], rel=1e-3)
    assert rate["tokens_per_s"] == pytest.approx(batch * length * rate["runs_per_s"], rel=1e-3)
    found = bench(Request(str(folder), WORK, tokens=7))
    assert found is not None
    rate = found["throughput"]
    assert rate["tokens_per_s"] == pytest.approx(7 * rate["runs_per_s"], rel=1e-3)


def test_on_gpus_the_prediction_stands_beside_the_measurement(folder: Path) -> None:
    found, report = gpu_result(folder), load(folder).report
    assert found["predicted"]["total_us"] == report["time"]["total_us"]
    assert found["predicted"]["latency_ratio"] == pytest.approx(165 / report["time"]["total_us"], rel=1e-3)
    expected = sum(entry["predicted_us"] for entry in found["kernels"])
    assert expected == pytest.approx(sum(report["time"]["instructions_us"]), rel=1e-3)


def test_the_document_names_every_field_and_no_other(folder: Path) -> None:
    rows = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row) if not name.startswith("--")}
    assert set(fields(gpu_result(folder))) == documented


def test_the_text_says_all_of_it(folder: Path) -> None:
    for found in (gpu_result(folder), bench(Request(str(folder), WORK))):
        assert found is not None
        text = bench_text(found, full=True)
        assert max(map(len, text.splitlines())) <= 100
        for entry in found["kernels"]:
            assert entry["kernel"] in text
    assert "predicted" in bench_text(gpu_result(folder))


# --- the command line -----------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(command: Command, folder: Path, tmp_path: Path) -> None:
    found, traced = tmp_path / "r.json", tmp_path / "t.json"
    done = command("bench", folder, "--runs", 2, "--warmup", 1, "--json", found, "--trace", traced)
    assert done.code == 0, done.err
    assert "p99" in done.out
    assert json.loads(found.read_text())["runs"] == 2
    assert json.loads(traced.read_text())["traceEvents"]
    assert command("bench", folder, "--runs", 1, "--json", "-").json["runs"] == 1


def test_given_inputs_and_random_weights(command: Command, tmp_path: Path) -> None:
    plan = compile_fixture(command, "llama_op23", tmp_path / "m.plan", "--tp", 2, "--no-weights")
    check_failure(command("bench", plan, "--runs", 1), 5)
    assert command("bench", plan, "--runs", 1, "--random-weights").code == 0
    assert command("bench", plan, "--runs", 1, "--weights", inputs.load("llama_op23").path).code == 0
    ports = load(plan).programs[0].inputs
    np.savez(tmp_path / "x.npz", **{port.name: np.zeros(port.shape, port.dtype) for port in ports})
    assert command("bench", plan, "--runs", 1, "--random-weights", "--inputs", tmp_path / "x.npz").code == 0


def test_failures_are_one_line(command: Command, folder: Path, tmp_path: Path) -> None:
    check_failure(command("bench", tmp_path / "nowhere.plan"), 5, "nowhere")
    check_failure(command("bench", folder, "--runs", 0), 2, "--runs")
    check_failure(command("bench", folder, "--weights", "m.onnx", "--random-weights"), 2, "--random-weights")
    check_failure(command("bench", folder, "--device", "tpu"), 7, "tpu")
    check_failure(command("bench", folder, "--runs", 1, "--trace", tmp_path / "no" / "t.json"), 7, "cannot be written")
    np.savez(tmp_path / "x.npz", wrong=np.zeros(3))
    check_failure(command("bench", folder, "--inputs", tmp_path / "x.npz"), 7, "wrong")


@pytest.mark.parametrize("name", ["bench", "doctor"])
def test_help(command: Command, name: str) -> None:
    done = command(name, "--help")
    assert done.code == 0
    assert "--json" in done.out


def test_ranks_that_a_session_controls_measure_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_WORKER", (str(Path(__file__).with_name("cpu_worker.py")),))
    monkeypatch.setattr(ranks, "device_count", lambda: 2)
    found = bench(Request(str(folder), WORK, device="cuda"))
    assert found is not None
    assert [own["rank"] for own in found["per_rank"]] == [0, 1]
    assert sum(entry["count"] for entry in found["kernels"]) == len(load(folder).programs[0].instructions)


def test_ranks_of_mpi_measure_together(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    launcher = Path(sys.executable).with_name("mpiexec")
    if not launcher.exists():
        pytest.skip("no mpiexec beside this Python")
    command = [str(launcher), "-n", "2", sys.executable, "-m", "onnxmesh", "bench", str(folder), "--runs", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "r.json")],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert [own["rank"] for own in found["per_rank"]] == [0, 1]
    assert done.stdout.count("p99") == 1
