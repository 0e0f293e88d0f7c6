"""The doctor: what it says without a GPU, and that what it measures is right (here on the engine of the CPU)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command, check_failure

from onnxmesh.runtime import doctor, nvml
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.cuda import measure
from onnxmesh.runtime.cuda import measure_programs as programs
from onnxmesh.runtime.cuda.device import device_count
from onnxmesh.runtime.device import HostDevice
from onnxmesh.runtime.doctor_text import doctor_text
from onnxmesh.runtime.engine import Engine
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.host import LoneCommunicator
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.profile import load
from onnxmesh.runtime.profile_fit import fit
from onnxmesh.runtime.threads import run_ranks


def has_gpu() -> bool:
    try:
        return device_count() > 0
    except RunError:
        return False


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of few instructions."""
    monkeypatch.setattr(measure, "ENOUGH", 1.0)


no_gpu = pytest.mark.skipif(has_gpu(), reason="says what a host without a GPU gets")


# --- what there is --------------------------------------------------------------------------------------------


@no_gpu
def test_without_a_gpu_it_says_so_and_what_is_missing(command: Command) -> None:
    done = command("doctor")
    assert done.code == 0
    assert "No GPU can be used" in done.out
    assert "BLAS" in done.out
    assert max(map(len, done.out.splitlines())) <= 100


@no_gpu
def test_a_profile_needs_a_gpu(command: Command) -> None:
    check_failure(command("doctor", "--profile", "p.json"), 7, "there is none")
    check_failure(command("doctor", "--profile", "p.json", "--quick"), 2, "--quick")


def test_the_findings_are_json_with_all_their_parts(command: Command) -> None:
    found = command("doctor", "--json", "--quick").json
    assert found["format"] == doctor.FORMAT
    assert set(found) == {
        *("format", "host", "driver", "cuda", "gpus", "no_gpu", "links", "libraries", "environment", "notes"),
        *("cache", "collectives", "seconds", "profile", "problems"),
    }
    assert found["host"]["cores"] > 0
    names = [each["name"] for each in found["libraries"]]
    assert {"CuPy", "NCCL", "cuDNN", "cuDNN frontend", "cuBLASLt bindings"} <= set(names)
    assert all(each["cost"] and each["install"] for each in found["libraries"])


def test_variables_that_matter_are_shown_with_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("NCCL_SOMETHING", "x")
    monkeypatch.setenv("ONNXMESH_CACHE", "/nowhere/else")
    found = doctor.examine(measure=False)
    assert found["environment"]["NCCL_SOMETHING"] == "x"
    assert "host" in found["notes"]["NCCL_P2P_DISABLE"]
    assert found["cache"]["folder"] == "/nowhere/else"
    assert "NCCL_P2P_DISABLE=1" in doctor_text(found)


def test_versions_as_people_write_them() -> None:
    assert doctor._dotted(13000, 1000) == "13.0"
    assert doctor._dotted(12090, 1000) == "12.9"
    assert doctor._dotted(22809, 10000) == "2.28.9"
    assert doctor._dotted(91900, 10000) == "9.19.0"


def test_without_a_driver_nvml_knows_nothing() -> None:
    if nvml._library() is None:
        assert nvml.driver_version() is nvml.nvlinks("0000:00:00.0") is nvml.over_nvlink("0", "1") is None
        assert nvml.count() == 0


def test_what_is_wrong_is_said() -> None:
    found = doctor.examine(measure=False)
    gpus = [{"index": i, "name": name, "memory_bytes": 1 << 37, "compute_capability": "9.0", "processors": 132}
            for i, name in enumerate(("H200", "H100"))]  # fmt: skip
    rows = [
        {
            "kind": "AllReduce",
            "ranks": 2,
            "bytes": size,
            "sent": size,
            "us": 10.0,
            "bus_GB_s": 200.0,
            "correct": size > 9,
        }
        for size in (8, 1 << 20)
    ]
    link = {"a": 0, "b": 1, "kind": "through the host", "peer_access": False}
    found |= {
        "gpus": gpus,
        "links": [link],
        "collectives": rows,
        "seconds": 3.0,
        "cache": {**found["cache"], "writable": False},
    }
    problems = found["problems"] = list(doctor._problems(found))
    for words in ("cannot be written", "cannot reach", "not alike", "wrong result"):
        assert any(words in problem for problem in problems)
    text = doctor_text(found)
    assert "H100" in text
    assert "SOME RESULTS WERE WRONG" in text
    assert max(map(len, text.splitlines())) <= 100


# --- what is measured -----------------------------------------------------------------------------------------


def on_ranks(ranks: int, work: Callable[[measure.Bench, Callable[[Mesh], Communicator]], Any]) -> list[Any]:
    """What `work` gives on each of so many ranks of the CPU."""

    def rank(comm: Communicator) -> Any:
        everyone = tuple(range(ranks))
        bench = measure.Bench(HostDevice(), comm, lambda x: float(comm.all_reduce(np.array([x]), everyone, "max")[0]))

        def on(mesh: Mesh) -> Communicator:
            assert mesh == comm.mesh
            return comm

        return work(bench, on)

    return run_ranks(Mesh.of(tp=ranks), rank)


@pytest.mark.parametrize("kind", programs.KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_measured_collective_is_checked_to_the_bit(kind: str, ranks: int) -> None:
    size = programs.elements(1000, ranks)

    def run(comm: Communicator) -> bool:
        chain = programs.collective(kind, "tp", comm.rank, ranks, size, 3)
        (result,) = Engine(chain.program, chain.weights, comm).run(chain.inputs)
        wrong = np.array(result)
        wrong.reshape(-1)[-1] += 1
        assert not programs.correct(kind, comm.rank, ranks, wrong)
        return programs.correct(kind, comm.rank, ranks, result)

    assert run_ranks(Mesh.of(tp=ranks), run) == [True] * ranks


def test_the_rows_of_collectives() -> None:
    rows = on_ranks(2, lambda bench, on: list(measure.collectives(bench, on, (1024, 4096), [2])))
    assert len(rows[0]) == 10
    assert [row["correct"] for row in rows[0]] == [True] * 10
    first = rows[0][0]
    assert (first["kind"], first["ranks"], first["bytes"], first["sent"]) == ("AllReduce", 2, 1024, 1024)
    assert first["bus_GB_s"] == pytest.approx(first["sent"] / first["us"] / 1e3)
    assert [row["us"] for row in rows[0]] == [row["us"] for row in rows[1]]


def test_chains_run_one_instruction_again_and_again() -> None:
    chain = programs.gemm("float32", 3, 5, 7, 4)
    (y,) = Engine(chain.program, chain.weights).run(chain.inputs)
    np.testing.assert_allclose(y, chain.inputs[0] @ chain.weights[2], rtol=1e-5)  # the third wrote it last
    assert len(chain.weights) == 4
    chain = programs.attention("float32", 4, 2, 8, 8, 16, causal=True, count=2)
    (o,) = Engine(chain.program, chain.weights).run(chain.inputs)
    np.testing.assert_allclose(o[0, 0, 0], chain.inputs[2][0, 0, 0], rtol=1e-5)  # the first query sees one key
    chain = programs.elementwise("float32", 64, 2)
    (y,) = Engine(chain.program, chain.weights).run(chain.inputs)
    np.testing.assert_allclose(y, chain.inputs[0])


def test_what_is_measured_makes_a_profile() -> None:
    small = {"float32": ((16, 16, 16), (4, 64, 64), (64, 64, 64))}
    heads = {"float32": ((2, 2, 16, 16, 8, False), (2, 1, 32, 32, 8, True))}

    def rows(bench: measure.Bench, on: Callable[[Mesh], Communicator]) -> dict[str, Any]:
        return {
            "gemm": list(measure.gemms(bench, small)),
            "attention": list(measure.attentions(bench, heads)),
            "memory": list(measure.sums(bench, (64, 4096))),
            "collectives": list(measure.collectives(bench, on, (256, 65536), [2])),
            "contention": measure.contention(bench, on, side=32, size=4096),
        }

    found = on_ranks(2, rows)[0]
    json.dumps(found)
    profile = fit("a laptop", 2, found, {})
    assert profile.gemm["float32"].rate > 0
    assert profile.contention >= 1


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this host had two GPUs, whose ranks then run on the CPU."""
    gpu = {"name": "NVIDIA H200", "memory_bytes": 1 << 37, "compute_capability": "9.0", "processors": 132, "bus": "0"}
    monkeypatch.setattr(doctor, "_MEASURE", (str(Path(__file__).with_name("cpu_measure.py")),))
    monkeypatch.setattr(doctor, "_gpus", lambda: ([{**gpu, "index": i} for i in range(2)], ""))
    monkeypatch.setattr(doctor, "_links", lambda gpus: iter(()))


@pytest.mark.usefixtures("_two_gpus")
def test_the_doctor_starts_ranks_and_collects_what_they_measure() -> None:
    found = doctor.examine()
    assert [row["kind"] for row in found["collectives"]] == list(programs.KINDS)
    assert all(row["correct"] and row["ranks"] == 2 for row in found["collectives"])
    assert found["seconds"] > 0
    assert "every result was right" in doctor_text(found)


@pytest.mark.usefixtures("_two_gpus")
def test_the_doctor_writes_a_profile(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    done = command("doctor", "--profile", path)
    assert done.code == 0, done.err
    assert f"compile --profile {path}" in " ".join(done.out.split())
    profile = load(path)
    assert (profile.name, profile.processors) == ("H200", 132)
    assert profile.about["gpus"] == 2
    assert len(profile.about["rows"]["gemm"]) == 3


@pytest.mark.usefixtures("_two_gpus")
def test_a_rank_that_fails_is_named_with_what_it_said() -> None:
    with pytest.raises(RunError, match="rank 0 of the measurement failed: error: this one fails"):
        doctor._measured("fail", 2)


def test_ranks_to_measure() -> None:
    assert [measure.group_sizes(world) for world in (1, 2, 4, 6, 8)] == [[], [2], [2, 4], [2, 6], [2, 4, 8]]


def test_one_rank_has_no_collectives_to_check() -> None:
    bench = measure.Bench(HostDevice(), LoneCommunicator(Mesh.of(), 0), float)
    assert measure.check(bench, lambda mesh: bench.rank) == {"collectives": []}
