"""The plans that GPU tests run, without weights: every fixture on meshes of 1, 2 and 4 ranks, in every precision.

python tests/gpu/plans.py FOLDER        compile them all ahead; ONNXMESH_TEST_PLANS=FOLDER then finds them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import shares
from shares import CASES, Case, fixtures

from onnxmesh.compiler.errors import ShardingError
from onnxmesh.compiler.options import Precision

ALL = (Case(), *CASES)
RANKS = (1, 2, 4)
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What a plan computes in. A model in half precision runs in its own only."""
_OPTIONS: dict[str, Precision] = {"fp16": "fp16", "bf16": "bf16"}
REFUSED = "refused"


@dataclass(frozen=True)
class Trial:
    """A fixture on a mesh in a precision (`fp32`, `fp16`, `bf16`)."""

    name: str
    case: Case
    precision: str

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return DTYPES[self.precision]

    @property
    def converted(self) -> bool:
        """Whether the compiler converts the model, which is in float32."""
        return fixtures.load(self.name).dtype != self.dtype

    @property
    def key(self) -> str:
        """`llama_op23-tp2-x-cp2`, `mlp_op18-one-bf16`: its name in files and tables."""
        mesh = self.case.name.replace(" ", "-") or "one"
        return f"{self.name}-{mesh}-{self.precision}" if self.converted else f"{self.name}-{mesh}"


def trials(ranks: Sequence[int] = RANKS, precisions: Sequence[str] = tuple(DTYPES)) -> Iterator[Trial]:
    """Every fixture with every mesh of so many ranks, in these precisions."""
    for count in ranks:
        for name in fixtures.names():
            own = fixtures.load(name).dtype
            for case in ALL:
                if case.mesh.size == count:
                    fitting = (p for p in precisions if own in ("float32", DTYPES[p]))
                    yield from (Trial(name, case, precision) for precision in fitting)


def folder_of(base: Path, trial: Trial) -> Path:
    """Where a plan is kept."""
    return base / f"{trial.key}.plan"


def make(base: Path, trial: Trial) -> Path | None:
    """The plan's folder, compiled into `base` unless it is there; None where the compiler refuses it."""
    folder = folder_of(base, trial)
    if not folder.exists():
        precision: Precision = _OPTIONS[trial.precision] if trial.converted else "model"
        result = shares.try_compile(trial.name, trial.case, precision=precision)
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
    with ProcessPoolExecutor() as pool:
        made = list(pool.map(partial(make, Path(target)), trials()))
    print(f"{len(made)} plans, {made.count(None)} refused")


if __name__ == "__main__":
    main(sys.argv[1])
