"""`mpirun -n 4 onnxmesh run`: every process has a copy of the plan without the shards of the others."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import inputs
import numpy as np
import pytest

import onnxmesh
from onnxmesh.compiler.verification import compare, reference
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.validate import shard_key

LAUNCHER = Path(sys.executable).parent / "mpirun"  # the one of the mpich wheel
MESH = Mesh.of(tp=2, cp=2)

pytestmark = pytest.mark.skipif(
    not find_spec("mpi4py") or not LAUNCHER.exists(), reason="needs pip install 'onnxmesh[mpi]'"
)


def compile_to(folder: Path, name: str, **options: object) -> onnxmesh.Plan:
    """The plan of a fixture on MESH, saved."""
    fixture = inputs.load(name)
    settings = {"tp": 2, "cp": 2, "dims": fixture.bindings()} | options
    return onnxmesh.compile(fixture.path, **settings).save(folder)  # type: ignore[arg-type]


def own_copies(plan: onnxmesh.Plan, source: Path, target: Path) -> None:
    """`target/RANK/a.plan` with the files of that rank alone."""
    for rank in range(MESH.size):
        folder = Path(shutil.copytree(source, target / str(rank) / "a.plan"))
        own = {shard_key(weight.spec, MESH, MESH.coordinate(rank)) for weight in plan.weights}
        for file in (folder / "weights").iterdir():
            if file.stem not in own:
                file.unlink()


def mpirun(folder: Path, *options: object, ranks: int = MESH.size) -> subprocess.CompletedProcess[str]:
    """Every rank runs the plan in its own folder, `folder/RANK`."""
    command = [sys.executable, "-m", "onnxmesh", "run", "a.plan", *map(str, options)]
    each = [["-n", "1", "-wdir", str(folder / str(rank)), *command] for rank in range(ranks)]
    joined = [word for i, one in enumerate(each) for word in ([":"] if i else []) + one]
    return subprocess.run([str(LAUNCHER), *joined], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["llama_op23", "gpt2_op18", "bert_ts17", "llama_bf16"])
def test_ranks_that_hold_nothing_but_their_own(tmp_path: Path, name: str) -> None:
    fixture = inputs.load(name)
    plan = compile_to(tmp_path / "whole.plan", name)
    own_copies(plan, tmp_path / "whole.plan", tmp_path)
    files = [{p.name for p in (tmp_path / str(rank)).rglob("*.safetensors")} for rank in range(MESH.size)]
    assert all(files[0] != other for other in files[1:])
    feeds = fixture.make_inputs()
    np.savez(tmp_path / "x.npz", **feeds)
    done = mpirun(tmp_path, "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz")
    assert done.returncode == 0, done.stderr
    limit = 1e-4 if fixture.dtype == "float32" else 2e-2
    expected = reference(fixture.path, feeds)[1]
    ports = {port.name: port for port in plan.programs[0].outputs}
    outputs = onnxmesh_outputs(tmp_path / "y.npz", ports)
    assert set(outputs) == set(fixture.outputs)
    for output, array in outputs.items():
        assert compare(output, array, expected[output], limit).agrees


def onnxmesh_outputs(file: Path, ports: dict[str, object]) -> dict[str, np.ndarray]:
    """The outputs in an .npz, in the dtypes of the plan."""
    from onnxmesh.runtime.io import read_inputs

    return read_inputs(file, list(ports.values()))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the Llama plan for every rank."""
    folder = tmp_path_factory.mktemp("llama")
    own_copies(compile_to(folder / "whole.plan", "llama_op23"), folder / "whole.plan", folder)
    np.savez(folder / "x.npz", **inputs.load("llama_op23").make_inputs())
    return folder


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error")]


def test_only_rank_0_has_inputs_and_outputs(llama: Path, tmp_path: Path) -> None:
    """The others are given a path that does not exist, and do not look at it."""
    shutil.copy(llama / "x.npz", llama / "0" / "x.npz")
    done = mpirun(llama, "--io", "root", "--inputs", "x.npz", "--outputs", tmp_path / "y.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("logits") == 1
    assert mpirun(llama, "--inputs", llama / "x.npz", "--outputs", tmp_path / "z.npz").returncode == 0
    with np.load(tmp_path / "y.npz") as root, np.load(tmp_path / "z.npz") as every:
        np.testing.assert_array_equal(root["logits"], every["logits"])


def test_sharded_outputs_are_written_by_each_rank(tmp_path: Path) -> None:
    plan = compile_to(tmp_path / "whole.plan", "llama_op23", shard_outputs=True)
    own_copies(plan, tmp_path / "whole.plan", tmp_path)
    done = mpirun(tmp_path, "--random-inputs", 0, "--outputs", tmp_path / "y.npz")
    assert done.returncode == 0, done.stderr
    (port,) = plan.programs[0].outputs
    assert port.spec
    for rank in range(MESH.size):
        with np.load(tmp_path / f"y.rank{rank}.npz") as file:
            assert file["logits"].shape == plan.programs[0].buffers[port.buffer].shape


def test_the_wrong_number_of_processes(llama: Path) -> None:
    done = mpirun(llama, "--random-inputs", 0, ranks=2)
    assert done.returncode == 5
    assert errors(done) == ["error[OM4201]: the plan is for the mesh dp=1,cp=2,tp=2 of 4 ranks, but MPI started 2"]
    assert "mpirun -n 4" in done.stderr


def test_wrong_inputs(llama: Path) -> None:
    for io in ("all", "root"):
        done = mpirun(llama, "--inputs", llama / "gone.npz", "--io", io)
        assert done.returncode == 7
        (line,) = errors(done)
        assert "gone.npz" in line


def test_a_damaged_shard_of_one_rank(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "copy"))
    (shard,) = (folder / "2").rglob("tp0.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = mpirun(folder, "--random-inputs", 0)
    assert done.returncode == 5
    (line,) = errors(done)
    assert line.startswith("error[OM4002]: rank 2: ")
    assert "tp0" in line
