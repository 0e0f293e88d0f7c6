"""Sessions on GPUs: one that controls its ranks, one per rank under a launcher, and ranks that are killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_session import HIDDEN, MODEL, WANT, X, close, plan

from onnxmesh.runtime.errors import InvalidArgument, RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.serialize import save
from onnxmesh.runtime.session import Session

MESHES = [Mesh.of(), Mesh.of(tp=2), Mesh.of(tp=2, cp=2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_session_controls_its_ranks(mesh: Mesh, gpus: Any) -> None:
    gpus(mesh.size)
    with Session(plan(mesh), "cuda", weights=MODEL.__getitem__) as session:
        for factor in (1, 2, -1, 3):
            hidden = np.maximum(X * factor @ MODEL["w1"], 0)
            close(session.run(None, {"x": X * factor}), [hidden @ MODEL["w2"], hidden, hidden @ MODEL["w2"]])
        close(session.run(["hidden"], {"x": X}), [HIDDEN])
        with pytest.raises(InvalidArgument):
            session.run(None, {"x": X.T})
        close(session.run(None, {"x": X}), WANT)
    with pytest.raises(RunError, match="closed"):
        session.run(None, {"x": X})


def test_a_killed_rank_is_named_and_no_rank_survives(gpus: Any) -> None:
    gpus(2)
    session = Session(plan(Mesh.of(tp=2)), "cuda", weights=MODEL.__getitem__, timeout=10)
    assert session._processes is not None
    processes = session._processes._processes
    close(session.run(None, {"x": X}), WANT)
    processes[1].kill()
    start = time.monotonic()
    with pytest.raises(RunError, match="rank 1"):
        session.run(None, {"x": X})
    assert time.monotonic() - start < 15
    assert all(process.poll() is not None for process in processes)


def test_a_stalled_rank_ends_the_run(gpus: Any) -> None:
    gpus(2)
    session = Session(plan(Mesh.of(tp=2)), "cuda", weights=MODEL.__getitem__, timeout=3)
    assert session._processes is not None
    processes = session._processes._processes
    close(session.run(None, {"x": X}), WANT)
    subprocess.run(["kill", "-STOP", str(processes[1].pid)], check=True)
    start = time.monotonic()
    with pytest.raises(RunError, match="rank"):
        session.run(None, {"x": X})
    assert time.monotonic() - start < 30
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_line_as_one_process_and_as_one_per_rank(ranks: int, gpus: Any, tmp_path: Path) -> None:
    gpus(ranks)
    save(plan(Mesh.of(tp=ranks)), tmp_path / "m.plan", MODEL.__getitem__)
    np.savez(tmp_path / "x.npz", x=X)
    command = [sys.executable, "-m", "onnxmesh", "run", str(tmp_path / "m.plan"), "--device", "cuda"]
    command += ["--inputs", str(tmp_path / "x.npz"), "--io", "root", "--outputs"]
    done = subprocess.run([*command, str(tmp_path / "y.npz")], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        processes.append(subprocess.Popen([*command, str(tmp_path / "z.npz")], env=environment, text=True))
    assert [process.wait(200) for process in processes] == [0] * ranks
    for name in ("y", "z"):
        with np.load(tmp_path / f"{name}.npz") as file:
            close([file[key] for key in ("y", "hidden", "partial")], WANT)
