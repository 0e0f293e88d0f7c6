"""The plans that GPU tests run: every fixture on meshes of 1, 2 and 4 ranks, without weights.

python tests/gpu/plans.py FOLDER        compile them all ahead; ONNXMESH_TEST_PLANS=FOLDER then finds them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import starmap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import shares
from shares import CASES, Case, fixtures

from onnxmesh.compiler.errors import ShardingError

ALL = (Case(), *CASES)
REFUSED = "refused"


def cases(ranks: int) -> Iterator[tuple[str, Case]]:
    """Every fixture with every mesh of so many ranks."""
    return ((name, case) for name in fixtures.names() for case in ALL if case.mesh.size == ranks)


def folder_of(base: Path, name: str, case: Case) -> Path:
    """Where a plan is kept."""
    return base / f"{name}-{case.name.replace(' ', '-') or 'one'}.plan"


def make(base: Path, name: str, case: Case) -> Path | None:
    """The plan's folder, compiled into `base` unless it is there; None where the compiler refuses it."""
    folder = folder_of(base, name, case)
    if not folder.exists():
        result = shares.try_compile(name, case)
        if isinstance(result, ShardingError):
            folder.mkdir()
            (folder / REFUSED).write_text(str(result))
        else:
            replace(shares.plan_of(result), report={}).save(folder, weights=False)
    return None if (folder / REFUSED).exists() else folder


def base(default: Path) -> Path:
    """The folder of plans compiled ahead, or `default`."""
    return Path(os.environ.get("ONNXMESH_TEST_PLANS", default))


def main(target: str) -> None:
    """Compile all into `target`, on every core."""
    Path(target).mkdir(parents=True, exist_ok=True)
    work = [(Path(target), name, case) for ranks in (1, 2, 4) for name, case in cases(ranks)]
    with ProcessPoolExecutor() as pool:
        made = list(pool.map(_make, work))
    print(f"{len(made)} plans, {made.count(None)} refused")


def _make(work: tuple[Path, str, Case]) -> Path | None:
    return next(starmap(make, [work]))


if __name__ == "__main__":
    main(sys.argv[1])
