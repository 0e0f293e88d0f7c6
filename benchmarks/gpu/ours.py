"""Time onnxmesh on this host's GPUs, on the works that peers.py times.

python benchmarks/gpu/ours.py GRAPHS OUT.jsonl [--only flux-4608,llama] [--ranks 1 4] [--budget 500]

GRAPHS holds the exported graphs. Plans are compiled first, without weights; weights are random. The configuration of
each work that is predicted to be the fastest comes first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from plans import Case, cases, compile_all
from processes import Clock, Json, append, run
from shapes import Work, selected

LONG = 300_000
"""Predicted microseconds from which runs are fewer."""


def main() -> None:
    """Time all that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plans", type=Path, help="a folder for plans; by default beside OUT")
    parser.add_argument("--only", help="names of works, or how they begin, with commas")
    parser.add_argument("--ranks", type=int, nargs="*", help="numbers of GPUs; by default 1, 4, 2 and 8")
    parser.add_argument("--first", type=int, default=99, help="so many configurations of each work")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for one configuration")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trace", type=Path, help="a folder for a Chrome trace of each")
    given = parser.parse_args()
    clock = Clock(given.budget)
    plans = given.plans or given.out.parent / "plans"
    for ranks in given.ranks or [n for n in (1, 4, 2, 8) if n <= _gpus()]:
        for case, report in _planned(given, ranks, plans):
            line: Json = {"work": case.work.name, "ranks": ranks, "configuration": case.name}
            if not clock.left:
                append(given.out, {**line, "error": "not run: the time was used up"})
            elif isinstance(report, str):
                append(given.out, {**line, "error": report})
            else:
                append(given.out, {**line, **_measured(case, plans, report, given, min(given.limit, clock.left))})


def _gpus() -> int:
    from onnxmesh.runtime.cuda.device import import_cupy

    return int(import_cupy().cuda.runtime.getDeviceCount())


def _planned(given: argparse.Namespace, ranks: int, plans: Path) -> list[tuple[Case, Json | str]]:
    """Every work's fastest by prediction, then every work's second, and so on."""
    found = [
        (place, *pair)
        for work in selected(given.only)
        for place, pair in enumerate(ordered(given.graphs, plans, work, ranks)[: given.first])
    ]
    return [(case, report) for _, case, report in sorted(found, key=lambda entry: entry[0])]


def ordered(graphs: Path, plans: Path, work: Work, ranks: int) -> list[tuple[Case, Json | str]]:
    """The configurations of `work`, the fastest by prediction first: the report, or why there is no plan."""
    wanted = cases(work, ranks)
    return sorted(zip(wanted, compile_all(wanted, graphs, plans)), key=_predicted)


def _predicted(pair: tuple[Case, Json | str]) -> float:
    report = pair[1]
    return float("inf") if isinstance(report, str) else float(report["time"]["total_us"])


def _measured(case: Case, plans: Path, report: Json, given: argparse.Namespace, seconds: float) -> Json:
    """What one configuration took, from `onnxmesh bench` in a process of its own."""
    plan = case.folder(plans)
    with TemporaryDirectory() as folder:
        result, log = Path(folder, "bench.json"), Path(folder, "log")
        command = [sys.executable, "-m", "onnxmesh", "bench", str(plan), "--device", given.device, "--random-weights"]
        runs = given.runs if report["time"]["total_us"] < LONG else min(given.runs, 20)
        command += ["--runs", str(runs), "--json", str(result)]
        if given.trace is not None:
            given.trace.mkdir(parents=True, exist_ok=True)
            command += ["--trace", str(given.trace / f"{plan.stem}.json")]
        error = run(command, seconds, log)
        if error or not result.exists():
            return {"error": error or "it wrote no result"}
        return summary(json.loads(result.read_text()), report)


def summary(bench: Json, report: Json) -> Json:
    """The line of a benchmark: the peers' figures first, then what only we know."""
    own = bench["memory"]["per_rank"]
    return {
        "latency_ms": bench["latency_us"]["p50"] / 1000,
        "back_to_back_ms": bench["back_to_back_us"] / 1000,
        "memory_bytes": max(entry["allocated_bytes"] for entry in own),
        "device": bench["device"],
        "predicted_ms": report["time"]["total_us"] / 1000,
        "predicted_memory_bytes": bench["memory"]["predicted_bytes"],
        "bytes_sent": sum(item["bytes"] for item in report["collectives"]),
        "compile_seconds": report["compile_seconds"],
        "graph": bench["graph"],
        "rank_us": {
            name: max(entry[name] for entry in bench["per_rank"]) for name in bench["per_rank"][0] if name != "rank"
        },
        "kernels": bench["kernels"][:14],
    }


if __name__ == "__main__":
    main()
