"""Every fixture on every mesh: the error, what is divided, and what is sent, as a Markdown table.

python benchmarks/fixtures_table.py [FIXTURE...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import shares
from shares import CASES, Case, fixtures

from onnxmesh.compiler.api import Compilation
from onnxmesh.compiler.errors import ShardingError

HEAD = (
    "fixture", "mesh", "error", "FLOPs sharded", "FLOPs a rank", "linear weights sharded", "linear weights a rank",
    "collectives",
)  # fmt: skip


def main(names: list[str]) -> None:
    print(row(HEAD))
    print(row(("---",) * len(HEAD)))
    for name in names:
        for case in CASES:
            print(row((name, case.name, *cells(name, case))), flush=True)


def row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def cells(name: str, case: Case) -> tuple[str, ...]:
    result = shares.try_compile(name, case)
    if isinstance(result, ShardingError):
        return ("refused", "", "", "", "", str(result).partition(" (hint:")[0])
    error = shares.worst_error(shares.plan_of(result), name)
    return (f"{error:.0e}", *divided(result), ", ".join(sent(result)))


def divided(state: Compilation) -> tuple[str, ...]:
    """Per axis, where there are several."""
    found = [shares.shares(placed) for placed in state.placed]
    columns = [(s.flops, s.flops_per_rank, s.weights, s.weights_per_rank) for s in found]
    return tuple(" / ".join(percent(value) for value in column) for column in zip(*columns))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def sent(state: Compilation) -> Iterator[str]:
    for kind, number in shares.counts(shares.plan_of(state)).items():
        yield f"{number} {kind}"


if __name__ == "__main__":
    main(sys.argv[1:] or fixtures.names())
