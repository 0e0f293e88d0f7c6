"""Every fixture on four MPI processes at tp=2 x cp=2, each with a copy of the plan that holds its own shards only.

python benchmarks/mpi_fixtures.py [NAME ...]

A table: the largest relative error of a fixture's outputs, the shard files of each rank, and seconds. Fixtures that
cannot be sharded on one of the axes are listed with the reason. Exit code 1 if an output differs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import onnxmesh
from onnxmesh.compiler.errors import ShardingError
from onnxmesh.compiler.verification import compare, default_tolerance, reference
from onnxmesh.runtime.io import read_inputs
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.validate import shard_key

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
import inputs  # noqa: E402  (lies with the fixtures)

MESH = Mesh.of(tp=2, cp=2)
LAUNCHER = Path(sys.executable).parent / "mpirun"


def main(names: list[str]) -> int:
    """Run the fixtures, print the table; 1 if one differs."""
    failed = False
    for name in names or inputs.names():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                text, good = check(name, Path(folder))
            except ShardingError as error:
                text, good = f"refused: {error.args[0]}", True
        failed |= not good
        print(f"{name:22} {'ok  ' if good else 'FAIL'} {time.perf_counter() - start:6.1f} s  {text}", flush=True)
    return int(failed)


def check(name: str, folder: Path) -> tuple[str, bool]:
    """Compile, run on processes and compare one fixture."""
    fixture = inputs.load(name)
    plan = onnxmesh.compile(fixture.path, tp=2, cp=2, dims=fixture.bindings()).save(folder / "a.plan")
    counts = own_copies(plan, folder)
    feeds = fixture.make_inputs()
    np.savez(folder / "x.npz", **feeds)
    done = launch(folder)
    if done.returncode:
        return " ".join(done.stderr.split()), False
    outputs = read_inputs(folder / "y.npz", plan.programs[0].outputs)
    expected = reference(fixture.path, feeds)[1]
    limit = default_tolerance(plan)
    worst = max(compare(k, outputs[k], expected[k], limit).error for k in fixture.outputs)
    return f"error {worst:.1e}, shard files of each rank {counts}", worst <= limit


def own_copies(plan: onnxmesh.Plan, folder: Path) -> list[int]:
    """`folder/RANK/a.plan` with that rank's shard files alone; how many each has."""
    counts = []
    for rank in range(MESH.size):
        copy = Path(shutil.copytree(folder / "a.plan", folder / str(rank) / "a.plan"))
        own = {shard_key(weight.spec, MESH, MESH.coordinate(rank)) for weight in plan.weights}
        for file in (copy / "weights").iterdir():
            if file.stem not in own:
                file.unlink()
        counts.append(len(list((copy / "weights").iterdir())))
    return counts


def launch(folder: Path) -> subprocess.CompletedProcess[str]:
    """Every rank in its own folder."""
    run = [sys.executable, "-m", "onnxmesh", "run", "a.plan", "--inputs", str(folder / "x.npz")]
    run += ["--outputs", str(folder / "y.npz")]
    words: list[str] = []
    for rank in range(MESH.size):
        words += [*([":"] if rank else []), "-n", "1", "-wdir", str(folder / str(rank)), *run]
    return subprocess.run([str(LAUNCHER), *words], capture_output=True, text=True, timeout=120, check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
