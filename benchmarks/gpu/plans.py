"""Our side's plans: which there are, and compiling them from the exported graphs.

python benchmarks/gpu/plans.py GRAPHS PLANS [--only flux-4608,llama]

Weights are not read: a plan without them is some hundred kilobytes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holes import dig
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


def compile_case(case: Case, graphs: Path, plans: Path) -> dict[str, Any]:
    """Write the plan of `case`, unless it is there; its report, with `compile_seconds`.

    Raises:
        OnnxMeshError: the graph does not compile.
    """
    import onnxmesh

    folder = case.folder(plans)
    start = time.perf_counter()
    if not (folder / "plan.json").exists():
        model = onnx_path(graphs, case.work)
        dig(model)
        made = onnxmesh.compile(str(model), tp=case.tp, cp=case.cp, cp_strategy=case.strategy)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made.save(folder, weights=False)
    seconds = time.perf_counter() - start
    return {**onnxmesh.load(folder).report, "compile_seconds": seconds}


def main() -> None:
    """Compile all that are asked for, and print what they predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("plans", type=Path)
    parser.add_argument("--only", help="names of works, or how they begin, with commas")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    given = parser.parse_args()
    for work in selected(given.only):
        for case in (case for ranks in sorted(given.ranks) for case in cases(work, ranks)):
            try:
                report = compile_case(case, given.graphs, given.plans)
            except Exception as error:  # the next may still compile
                print(f"{work.name:11} {case.name:18} {type(error).__name__}: {error}", flush=True)
                continue
            print(f"{work.name:11} {case.name:18} {_line(report)}", flush=True)


def _line(report: dict[str, Any]) -> str:
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
