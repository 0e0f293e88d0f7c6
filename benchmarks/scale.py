"""Large models: how long a compile takes, pass by pass, and how much memory.

python benchmarks/scale.py [--check] [CASE...]

Every case runs in a process of its own. `--check` exits non-zero where a limit is exceeded.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

GIB = 1 << 30


@dataclass(frozen=True)
class Job:
    """One compile, and what it may take.

    Attributes:
        weights: whether the shards are written too.
        layers: blocks of each kind; the real number if None.
    """

    model: str
    tp: int = 1
    cp: int = 1
    weights: bool = False
    layers: int | None = None
    seconds: float = 60.0
    memory: float = 2.0

    @property
    def mesh(self) -> str:
        return " x ".join(f"{axis}{size}" for axis, size in (("tp", self.tp), ("cp", self.cp)) if size > 1)

    @property
    def name(self) -> str:
        return f"{self.model}-{self.mesh}".replace(" ", "")


JOBS: tuple[Job, ...] = (
    *(Job(model, tp, cp) for model in ("flux", "llama-70b") for tp, cp in ((8, 1), (1, 8), (2, 4))),
    Job("eight-gib", tp=4, weights=True, seconds=600.0, memory=2.5),
)


@dataclass(frozen=True)
class Figures:
    """What a compile took."""

    seconds: float
    memory: float
    stages: dict[str, float]
    instructions: int

    def exceeded(self, job: Job) -> list[str]:
        """The limits that it exceeds, in words."""
        found = []
        if self.seconds > job.seconds:
            found.append(f"{job.name} took {self.seconds:.0f} s, {job.seconds:.0f} allowed")
        if self.memory > job.memory:
            found.append(f"{job.name} took {self.memory:.2f} GiB, {job.memory} allowed")
        return found


def peak_bytes() -> int:
    """The most memory that this process held. (It takes over ru_maxrss from the process that started it.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(job: Job, folder: Path) -> Figures:
    """Compile in a process of its own; the model must be in `folder`."""
    from onnxmesh.runtime.mesh import Mesh  # fails early, in the process that reports

    assert Mesh.of(tp=job.tp, cp=job.cp).size > 1
    arguments = [str(folder), job.model, str(job.tp), str(job.cp), str(int(job.weights))]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", *arguments], check=True, stdout=subprocess.PIPE
    )
    return Figures(**json.loads(done.stdout))


def child(folder: str, model: str, tp: str, cp: str, weights: str) -> None:
    """Compile, save, and print the figures as JSON: those of this process from its start."""
    start = time.perf_counter()
    from onnxmesh.compiler.api import compile_model
    from onnxmesh.compiler.options import Options
    from onnxmesh.runtime.mesh import Mesh

    imported = time.perf_counter()
    state = compile_model(str(Path(folder) / f"{model}.onnx"), Options(Mesh.of(tp=int(tp), cp=int(cp))))
    assert state.plan is not None
    compiled = time.perf_counter()
    state.plan.save(Path(folder) / f"{model}.plan", weights=bool(int(weights)))
    end = time.perf_counter()
    figures = {
        "seconds": end - start,
        "memory": peak_bytes() / GIB,
        "stages": {"import": imported - start, **state.seconds, "save": end - compiled},
        "instructions": len(state.plan.programs[0].instructions),
    }
    print(json.dumps(figures))


def write_model(job: Job, folder: Path) -> None:
    """Write the job's model, its weights streamed to disk or without any memory of their own."""
    from onnxmesh.models.catalogue import save

    path = folder / f"{job.model}.onnx"
    if not path.exists():
        save(job.model, path, job.layers, "streamed" if job.weights else "none")


def run(jobs: tuple[Job, ...]) -> Iterator[tuple[Job, Figures]]:
    """The figures of every job; models are written once each, and deleted in the end."""
    with TemporaryDirectory() as folder:
        for job in jobs:
            write_model(job, Path(folder))
            yield job, measure(job, Path(folder))


def table(results: list[tuple[Job, Figures]]) -> str:
    """Markdown."""
    stages = list(dict.fromkeys(stage for _, figures in results for stage in figures.stages))
    head = ["model", "mesh", "s", "GiB", "instructions", *stages]
    rows = [
        [
            job.model + (" with weights" if job.weights else ""),
            job.mesh,
            f"{figures.seconds:.1f}",
            f"{figures.memory:.2f}",
            str(figures.instructions),
            *(f"{figures.stages.get(stage, 0.0):.1f}" for stage in stages),
        ]
        for job, figures in results
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        child(*arguments[1:])
        return 0
    names = [name for name in arguments if name != "--check"]
    results = []
    for job, figures in run(tuple(job for job in JOBS if not names or job.name in names)):
        print(f"{job.name}: {figures.seconds:.1f} s, {figures.memory:.2f} GiB", file=sys.stderr, flush=True)
        results.append((job, figures))
    print(table(results))
    exceeded = [line for job, figures in results for line in figures.exceeded(job)]
    if "--check" in arguments:
        print("\n".join(exceeded), file=sys.stderr)
        return int(bool(exceeded))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
