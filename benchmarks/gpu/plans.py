"""Our side's plans: which there are, and compiling them from the exported graphs.

python benchmarks/gpu/plans.py GRAPHS PLANS [--only flux-4608,llama]

Weights are not read: a plan without them is some hundred kilobytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, cast

from holes import dig
from processes import Json
from shapes import Work, onnx_path, selected

STRATEGIES = ("ulysses", "allgather", "ring")


@dataclass(frozen=True)
class Case:
    """One plan of a work.

    Attributes:
        strategy: of the cp axis; `auto` where there is none.
    """

    work: Work
    tp: int = 1
    cp: int = 1
    strategy: str = "auto"

    @property
    def ranks(self) -> int:
        return self.tp * self.cp

    @property
    def name(self) -> str:
        """Of the configuration, such as `tp2 x cp4 ulysses`."""
        axes = [f"tp{self.tp}"] * (self.tp > 1)
        if self.cp > 1:
            axes.append(f"cp{self.cp}" + (f" {self.strategy}" if self.strategy != "auto" else ""))
        return " x ".join(axes) or "1 GPU"

    def folder(self, plans: Path) -> Path:
        """Where its plan is."""
        return plans / f"{self.work.name}-{self.name.replace(' ', '')}.plan"


def cases(work: Work, ranks: int) -> list[Case]:
    """The plans of `work` on so many GPUs, the most promising first."""
    if ranks == 1:
        return [Case(work)]
    if work.model == "llama":
        return [Case(work, tp=ranks)]
    found = [Case(work, cp=ranks, strategy=strategy) for strategy in STRATEGIES]
    found.append(Case(work, tp=ranks))
    found += [Case(work, tp=tp, cp=ranks // tp, strategy="ulysses") for tp in (2, 4) if tp < ranks]
    return found


def compile_all(wanted: Sequence[Case], graphs: Path, plans: Path) -> list[Json | str]:
    """Write the plan of each case, several at a time: its report with `compile_seconds`, or why there is no plan."""
    for work in {case.work for case in wanted}:
        dig(onnx_path(graphs, work))
    plans.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, len(wanted), os.cpu_count() or 1), mp_context=context) as pool:
        return list(pool.map(_compiled, wanted, repeat(graphs), repeat(plans)))


def _compiled(case: Case, graphs: Path, plans: Path) -> Json | str:
    import onnxmesh

    start = time.perf_counter()
    try:
        plan = onnxmesh.compile(
            str(onnx_path(graphs, case.work)), tp=case.tp, cp=case.cp, cp_strategy=cast(Any, case.strategy)
        )
        plan.save(case.folder(plans), weights=False)
    except Exception as error:  # the others may still compile
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return {**plan.report, "compile_seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    """Compile all that are asked for, and print what they predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("plans", type=Path)
    parser.add_argument("--only", help="names of works, or how they begin, with commas")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    given = parser.parse_args()
    wanted = [case for work in selected(given.only) for ranks in sorted(given.ranks) for case in cases(work, ranks)]
    for case, report in zip(wanted, compile_all(wanted, given.graphs, given.plans)):
        text = report if isinstance(report, str) else _line(report)
        print(f"{case.work.name:11} {case.name:18} {text}", flush=True)


def _line(report: Json) -> str:
    predicted, rank, sent = report["time"], report["rank"], report["collectives"]
    total, compute, sending = (predicted[f"{name}_us"] / 1000 for name in ("total", "compute", "communication"))
    return (
        f"{total:9.2f} ms (compute {compute:.2f}, communication {sending:.2f})"
        f" sends {sum(item['bytes'] for item in sent) / 1e6:8.1f} MB in {len(sent):3}"
        f" arena {rank['activation_bytes'] / 1e6:8.1f} MB, {rank['instructions']} instructions,"
        f" compiled in {report['compile_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
