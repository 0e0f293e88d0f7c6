"""Benchmarks of a plan: latency, throughput, memory, where the time goes, and how near the prediction was.

docs/bench.md describes the result and how it is measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np

from onnxmesh.runtime import footprint, timeline, trace
from onnxmesh.runtime import io as files
from onnxmesh.runtime.bench_rank import Work
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.launch import Job, as_rank, find_job, weights_source
from onnxmesh.runtime.plan import Collective, Plan
from onnxmesh.runtime.random_weights import RANDOM
from onnxmesh.runtime.serialize import load
from onnxmesh.runtime.session import Session
from onnxmesh.runtime.timeline import Timeline

FORMAT = 1
Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        weights: the ONNX file, or another plan's folder, that the weights are read from; `random` for random ones;
            else the plan's own.
        tokens: tokens of one run; the first two dims of the first input if 0.
        graph: whether GPUs run the program as CUDA graphs.
        trace: a file for a Chrome trace.
    """

    plan: str
    work: Work = field(default_factory=Work)
    weights: str | None = None
    device: str = "cpu"
    timeout: float = 60.0
    tokens: int = 0
    graph: bool = True
    trace: str | None = None


def bench(request: Request) -> Json | None:
    """The result as JSON data; None on ranks of a job other than the first. All ranks of a job call this.

    Raises:
        PlanError: the plan is damaged, or its mesh is not that of the job.
        InvalidArgument: the inputs are not those of the plan.
        RunError: a rank failed, or did not arrive in time; or the trace cannot be written.
    """
    job = find_job(request.device, request.timeout)
    if job is None:
        plan = load(request.plan)
        with _session(request, plan, None) as session:
            return _finish(request, plan, session.measure(request.work.to_json()))
    try:
        plan, found = _measure_as(request, job)
    finally:
        job.close()
    return _finish(request, plan, found) if job.rank == 0 else None


def _measure_as(request: Request, job: Job) -> tuple[Plan, dict[int, Json]]:
    """The plan, and what all ranks of the job measured."""
    make = partial(_session, request)
    with as_rank(job, request.plan, request.timeout, make) as (plan, session):
        found = job.allgather(list(session.measure(request.work.to_json()).items()))
        session.close()
    return plan, {int(rank): own for part in found for rank, own in part}


def _session(request: Request, plan: Plan, communicator: Communicator | None) -> Session:
    """Ready to measure. Raises as `bench`."""
    source = RANDOM if request.weights == RANDOM else weights_source(request.weights) if request.weights else None
    session = Session(
        plan,
        request.device,
        weights=source,
        communicator=communicator,
        timeout=request.timeout,
        graph=request.graph,
    )
    try:
        if request.work.inputs is not None:
            session.check(files.read_inputs(request.work.inputs, plan.programs[0].inputs))
    except Exception:
        session.close()
        raise
    return session


def _finish(request: Request, plan: Plan, found: Mapping[int, Json]) -> Json:
    ranks = [found[rank] for rank in range(plan.mesh.size)]
    timelines = timeline.aligned([timeline.from_json(own["timeline"]) for own in ranks], plan.programs[0])
    if request.trace is not None:
        trace.write(request.trace, trace.chrome_trace(plan.programs[0], plan.mesh, timelines))
    return result(plan, request, ranks, timelines)


def result(plan: Plan, request: Request, ranks: Sequence[Mapping[str, Any]], timelines: Sequence[Timeline]) -> Json:
    """The result from what every rank measured; `timelines` are on one clock."""
    program, on_gpu = plan.programs[0], ranks[0]["graph"] is not None
    predicted = plan.report.get("time", {}) if on_gpu else {}
    latencies = np.max([own["latencies_us"] for own in ranks], axis=0)
    together = max(own["back_to_back_us"] for own in ranks)
    shares = timeline.shares(timelines, program, plan.mesh)
    return {
        "format": FORMAT,
        "producer": plan.producer,
        "mesh": plan.mesh.to_json(),
        "ranks": plan.mesh.size,
        "device": ranks[0]["device"],
        "runs": request.work.runs,
        "warmup": request.work.warmup,
        "graph": ranks[0]["graph"],
        "latency_us": _percentiles(latencies),
        "back_to_back_us": round(together, 3),
        "throughput": _throughput(plan, together, request.tokens),
        "predicted": _predicted(predicted, float(np.median(latencies)), together),
        "memory": _memory(plan, ranks),
        "per_rank": [
            {"rank": rank, **{f"{name}_us": round(value, 3) for name, value in asdict(own).items()}}
            for rank, own in enumerate(shares)
        ],
        "kernels": _kernels(plan, timelines, predicted.get("instructions_us")),
    }


def _percentiles(latencies: np.ndarray) -> Json:
    p50, p90, p99 = np.percentile(latencies, [50, 90, 99])
    values = {"p50": p50, "p90": p90, "p99": p99, "min": latencies.min(), "max": latencies.max()}
    return {name: round(float(value), 3) for name, value in values.items()}


def _throughput(plan: Plan, microseconds: float, tokens: int) -> Json:
    """A second's runs, samples (the first dim of the first input) and tokens (its first two dims)."""
    runs = 1e6 / microseconds
    shape = plan.programs[0].inputs[0].shape if plan.programs[0].inputs else ()
    samples = shape[0] if shape else 1
    tokens = tokens or (prod(shape[:2]) if len(shape) > 1 else samples)
    return {
        "runs_per_s": round(runs, 3),
        "samples_per_s": round(runs * samples, 3),
        "tokens_per_s": round(runs * tokens, 3),
    }


def _predicted(predicted: Mapping[str, Any], median: float, together: float) -> Json | None:
    """The prediction, and measured over predicted; it is for GPUs, so there is none on a host."""
    if not predicted:
        return None
    total = max(float(predicted["total_us"]), 1e-3)
    return {
        "device": predicted["device"],
        "total_us": predicted["total_us"],
        "latency_ratio": round(median / total, 4),
        "back_to_back_ratio": round(together / total, 4),
    }


def _memory(plan: Plan, ranks: Sequence[Mapping[str, Any]]) -> Json:
    staged = any(own["memory"].get("staging") for own in ranks)
    staging = footprint.staging_bytes(plan.programs[0], plan.mesh) if staged else 0
    return {
        "predicted_bytes": footprint.device_bytes(plan) + staging,
        "per_rank": [
            {"rank": rank, "by_kind": own["memory"], "allocated_bytes": own["allocated_bytes"]}
            for rank, own in enumerate(ranks)
        ],
    }


def _kernels(plan: Plan, timelines: Sequence[Timeline], predicted: Sequence[float] | None) -> list[Json]:
    """By kernel, the longest first: how often it runs, the mean time of a rank, and what was predicted."""
    program = plan.programs[0]
    names = [item.kind if isinstance(item, Collective) else item.kernel for item in program.instructions]
    counts: dict[str, int] = defaultdict(int)
    measured: dict[str, float] = defaultdict(float)
    expected: dict[str, float] = defaultdict(float)
    for index, name in enumerate(names):
        counts[name] += 1
        measured[name] += sum(own[index].end_us - own[index].start_us for own in timelines) / len(timelines)
        expected[name] += predicted[index] if predicted is not None else 0.0
    return [
        {
            "kernel": name,
            "count": counts[name],
            "measured_us": round(measured[name], 3),
            "predicted_us": round(expected[name], 3) if predicted is not None else None,
        }
        for name in sorted(counts, key=lambda name: -measured[name])
    ]
