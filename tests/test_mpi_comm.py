"""The MPI communicator: the same bits as on threads, and an end for all ranks when one fails."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

LAUNCHER = Path(sys.executable).parent / "mpirun"  # the one of the mpich wheel

PRELUDE = """
import time
import numpy as np
from onnxmesh.runtime.comm import REDUCTIONS, CollectiveTimeout
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.mpi import MpiCommunicator
from onnxmesh.runtime.threads import run_ranks
mesh = Mesh.of(cp=2, tp=2)
"""


def mpirun(tmp_path: Path, program: str, ranks: int = 4) -> subprocess.CompletedProcess[str]:
    """Run `program` on so many processes, with the mpirun of this environment."""
    if not find_spec("mpi4py") or not LAUNCHER.exists():
        pytest.skip("needs pip install 'onnxmesh[mpi]'")
    script = tmp_path / "program.py"
    script.write_text(PRELUDE + dedent(program))
    return subprocess.run(
        [str(LAUNCHER), "-n", str(ranks), sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_collective_gives_the_same_bits_as_on_threads(tmp_path: Path) -> None:
    program = """
        AXES = ["tp", "cp", ("cp", "tp"), (3, 1, 0, 2)]

        def sample(rank, dtype, shape):
            return np.random.default_rng(rank).normal(0, 4, shape).astype(np.float32).astype(dtype)

        def results(comm):
            for axis in AXES:
                for dtype in REDUCTIONS:
                    yield from moves(comm, axis, sample(comm.rank, dtype, (4, 8)))
                    for op in sorted(REDUCTIONS[dtype]):
                        yield from reductions(comm, axis, op, sample(comm.rank, dtype, (4, 8)))
                yield comm.all_reduce(sample(comm.rank, "bfloat16", (5, 7001)), axis)
                yield comm.all_gather(sample(comm.rank, "float32", (300, 1000)), axis, 1)
                yield comm.all_reduce(np.array(comm.rank), axis)
                comm.barrier(axis)
            comm.barrier()

        def moves(comm, axis, x):
            root = comm.group(axis)[1] == comm.rank
            size = len(comm.group(axis))
            yield comm.all_gather(x, axis, 1)
            yield comm.all_to_all(x, axis, 0, 1)
            yield comm.broadcast(x, axis, 1)
            yield comm.gather(x, axis, 1, 1)
            yield comm.scatter(x if root else None, axis, 1, like=np.empty((4 // size, 8), x.dtype))
            yield comm.shift(x, axis, 1)
            yield comm.shift(x, axis, -1)

        def reductions(comm, axis, op, x):
            yield comm.all_reduce(x, axis, op)
            yield comm.reduce_scatter(x, axis, op, 1)
            yield comm.reduce(x, axis, op, 1)

        def same(a, b):
            if a is None or b is None:
                return a is b
            return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())

        with MpiCommunicator(mesh) as comm:
            actual = list(results(comm))
            expected = run_ranks(mesh, lambda c: list(results(c)))[comm.rank]
            assert len(actual) == len(expected) == 4 * (11 * 7 + 48 * 3 + 3)
            wrong = [i for i, pair in enumerate(zip(actual, expected)) if not same(*pair)]
            assert not wrong, wrong
            print("rank", comm.rank, "agrees")
    """
    done = mpirun(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} agrees" for rank in range(4)]


def test_a_rank_that_raises_ends_the_others(tmp_path: Path) -> None:
    program = """
        with MpiCommunicator(mesh) as comm:
            if comm.rank == 2:
                raise OSError("two\\nlines")
            comm.barrier()
            print("not reached")
    """
    start = time.monotonic()
    done = mpirun(tmp_path, program)
    assert time.monotonic() - start < 20
    assert done.returncode == 1
    assert "onnxmesh: rank 2 failed: OSError: two lines (" in done.stderr
    assert "not reached" not in done.stdout


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    program = """
        comm = MpiCommunicator(mesh, timeout=0.3)
        comm.all_reduce(np.zeros(2), ("cp", "tp"))
        if comm.rank == 3:
            time.sleep(30)
        comm.all_gather(np.zeros(2, np.float32), ("cp", "tp"))
    """
    start = time.monotonic()
    done = mpirun(tmp_path, program)
    assert time.monotonic() - start < 20
    assert done.returncode == 7
    text = "failed: CollectiveTimeout: all_gather #1 of ranks (0, 1, 2, 3) on float32[2], dim=0 timed out"
    assert text in done.stderr
    assert "no sign of rank 3" in done.stderr


def test_a_large_array_that_nobody_takes_is_a_timeout(tmp_path: Path) -> None:
    program = """
        comm = MpiCommunicator(mesh, timeout=0.3)
        if comm.rank == 0:
            comm.broadcast(np.zeros(1 << 22), "tp")
        time.sleep(30)
    """
    done = mpirun(tmp_path, program)
    assert done.returncode == 7
    assert "rank 0 failed: CollectiveTimeout: broadcast #0 of ranks (0, 1)" in done.stderr
    assert "no sign of rank 1" in done.stderr


def test_ranks_that_meet_with_different_calls(tmp_path: Path) -> None:
    program = """
        comm = MpiCommunicator(mesh)
        comm.all_gather(np.zeros(3 if comm.rank == 3 else 2), "tp")
        comm.barrier()
    """
    done = mpirun(tmp_path, program)
    assert done.returncode == 7
    assert "CollectiveMismatch" in done.stderr
    assert "float64[3]" in done.stderr
    assert "float64[2]" in done.stderr


def test_the_number_of_processes_must_be_the_size_of_the_mesh(tmp_path: Path) -> None:
    done = mpirun(tmp_path, "MpiCommunicator(mesh)", ranks=2)
    assert done.returncode == 1
    assert "mesh dp=1,cp=2,tp=2 has 4 ranks, but MPI started 2: use mpirun -n 4" in done.stderr


def test_without_mpi_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxmesh.runtime.mesh import Mesh
    from onnxmesh.runtime.mpi import MpiCommunicator

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"pip install 'onnxmesh\[mpi\]'"):
        MpiCommunicator(Mesh.of())
