"""The golden counts of collectives: one JSON for every fixture and mesh.

`python tests/goldens.py --update [FIXTURE...]` writes what the compiler does now; look at the difference before you
commit it. A pair that is refused has the reason instead of counts.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import shares
from shares import CASES, Case, fixtures

from onnxmesh.compiler.api import Compilation
from onnxmesh.compiler.errors import ShardingError

FILE = Path(__file__).parent / "goldens" / "collectives.json"

Golden = dict[str, int] | str


@cache
def load() -> dict[str, dict[str, Golden]]:
    """fixture -> case -> counts, or the reason of a refusal."""
    data: dict[str, dict[str, Golden]] = json.loads(FILE.read_text())
    return data


def golden_of(result: Compilation | ShardingError) -> Golden:
    """What the file keeps of a compile."""
    if isinstance(result, ShardingError):
        return str(result).partition(" (hint:")[0]
    return shares.counts(shares.plan_of(result))


def update(names: list[str]) -> None:
    """Compile the fixtures anew and write the file."""
    known = load() if FILE.exists() else {}
    fresh = {name: _cases(name) if name in names else known[name] for name in fixtures.names()}
    lines = [f' "{name}": {{\n' + ",\n".join(_lines(cases)) + "\n }" for name, cases in sorted(fresh.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _cases(name: str) -> dict[str, Golden]:
    print(name, flush=True)
    return {case.name: golden_of(shares.try_compile(name, case)) for case in CASES}


def _lines(cases: dict[str, Golden]) -> list[str]:
    return [f'  "{case}": {json.dumps(golden)}' for case, golden in cases.items()]


def case_named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--update"]:
        sys.exit(__doc__)
    update(sys.argv[2:] or fixtures.names())
