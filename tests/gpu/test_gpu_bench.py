"""Benchmarks, the doctor and its measurements on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_session import MODEL, plan
from test_trace import check

import onnxmesh
from onnxmesh.models import catalogue
from onnxmesh.runtime import doctor, profile_fit, timeline
from onnxmesh.runtime.bench import Request, bench
from onnxmesh.runtime.bench_rank import Work
from onnxmesh.runtime.bench_text import bench_text
from onnxmesh.runtime.doctor_text import doctor_text
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.random_weights import RANDOM
from onnxmesh.runtime.serialize import save

MESHES = [Mesh.of(), Mesh.of(tp=2), Mesh.of(tp=2, cp=2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_benchmark_and_its_trace(mesh: Mesh, gpus: Any, tmp_path: Path) -> None:
    gpus(mesh.size)
    wanted = plan(mesh)
    save(wanted, tmp_path / "m.plan", MODEL.__getitem__)
    trace = tmp_path / "t.json"
    request = Request(str(tmp_path / "m.plan"), Work(runs=20, warmup=4), device="cuda", trace=str(trace))
    found = bench(request)
    assert found is not None
    assert found["graph"]["captured"], found["graph"]
    assert 0 < found["latency_us"]["min"] <= found["latency_us"]["p50"] < 1e5
    assert found["back_to_back_us"] <= 1.2 * found["latency_us"]["p50"]
    check(json.loads(trace.read_text()), len(wanted.programs[0].instructions), mesh.size)
    bench_text(found)


def test_a_graph_is_faster_than_single_launches(gpus: Any, tmp_path: Path) -> None:
    gpus(1)
    save(plan(Mesh.of()), tmp_path / "m.plan", MODEL.__getitem__)
    times = {}
    for graph in (True, False):
        found = bench(Request(str(tmp_path / "m.plan"), Work(20, 4), device="cuda", graph=graph))
        assert found is not None
        assert found["graph"]["captured"] is graph
        times[graph] = found["latency_us"]["p50"]
    assert times[True] < times[False]


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_what_the_report_says(ranks: int, gpus: Any, tmp_path: Path) -> None:
    gpus(ranks)
    model = catalogue.save("llama-8b", tmp_path / "m.onnx", layers=2, weights="none", batch=1, seq=1024)
    compiled = onnxmesh.compile(model, tp=ranks)
    compiled.save(tmp_path / "m.plan", weights=False)
    found = bench(Request(str(tmp_path / "m.plan"), Work(5, 3), RANDOM, "cuda", timeout=120))
    assert found is not None
    predicted = compiled.report["rank"]["device_bytes"]
    for own in found["memory"]["per_rank"]:
        assert own["allocated_bytes"] == pytest.approx(predicted, rel=0.05), own


def test_waiting_is_told_apart_from_sending(gpus: Any, tmp_path: Path) -> None:
    gpus(2)
    save(plan(Mesh.of(tp=2)), tmp_path / "m.plan", MODEL.__getitem__)
    found = bench(Request(str(tmp_path / "m.plan"), Work(10, 3), device="cuda"))
    assert found is not None
    assert min(own["waiting_us"] for own in found["per_rank"]) >= 0
    assert all(own["communication_us"] > 0 for own in found["per_rank"])


def test_the_doctor_tests_the_links(gpus: Any) -> None:
    gpus(2)
    found = doctor.examine()
    assert found["gpus"] and found["links"] and found["driver"]
    assert len(found["collectives"]) == 20
    assert all(row["correct"] for row in found["collectives"])
    large = [row["bus_GB_s"] for row in found["collectives"] if row["bytes"] == 256 << 20]
    assert min(large) > 5
    print(doctor_text(found))


def test_products_attention_and_sums_are_measured_as_fast_as_they_are(gpus: Any) -> None:
    gpus(1)
    from onnxmesh.runtime.cuda import measure
    from onnxmesh.runtime.cuda.device import CudaDevice
    from onnxmesh.runtime.nccl import NcclCommunicator

    rank = NcclCommunicator(Mesh.of())
    bench = measure.Bench(CudaDevice(0), rank, float)
    shapes = {"bfloat16": ((4096, 4096, 4096), (4096, 8192, 1024), (512, 4096, 4096), (1, 8192, 8192), (256, 256, 256))}
    heads = {
        "bfloat16": ((16, 16, 4096, 4096, 128, False), (8, 8, 512, 512, 128, False), (16, 4, 4096, 4096, 128, True))
    }
    products, attentions = list(measure.gemms(bench, shapes)), list(measure.attentions(bench, heads))
    sums = list(measure.sums(bench, (1 << 12, 1 << 22, 1 << 26)))
    assert 2e-6 * 4096**3 / products[0]["us"] > 100  # TFLOP/s
    assert 4e-6 * 16 * 4096**2 * 128 / attentions[0]["us"] > 50
    assert sums[0]["us"] < 10
    assert 1e-3 * sums[-1]["bytes"] / sums[-1]["us"] > 500  # GB/s
    profile_fit.fit_gemm(products, 132)
    profile_fit.fit_attention(attentions, 132)
    rank.close()


def test_ranks_come_on_one_clock(gpus: Any, tmp_path: Path) -> None:
    gpus(2)
    from onnxmesh.runtime.session import Session

    with Session(plan(Mesh.of(tp=2)), "cuda", weights=MODEL.__getitem__) as session:
        found = session.measure(Work(3, 3).to_json())
        program = session.plan.programs[0]
    lines = timeline.aligned([timeline.from_json(found[rank]["timeline"]) for rank in range(2)], program)
    ends = [[t.end_us for t in own] for own in lines]
    assert np.median(np.abs(np.subtract(*ends))) < 50
