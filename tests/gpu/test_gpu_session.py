"""Sessions on GPUs: one that controls its ranks, one per rank under a launcher, and ranks that are killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_session import HIDDEN, MODEL, WANT, X, close, plan

from onnxmesh.runtime.errors import InvalidArgument, PlanError, RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Weight
from onnxmesh.runtime.serialize import load, save
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
    for _ in range(3):  # the first two have more time
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


def test_arrays_of_the_gpu_go_in_and_stay_there(gpus: Any) -> None:
    gpus(1)
    import cupy

    with Session(plan(Mesh.of()), "cuda", weights=MODEL.__getitem__) as session:
        for _ in range(4):
            got = session.run(None, {"x": cupy.asarray(X)}, device_outputs=True)
            assert all(isinstance(array, cupy.ndarray) for array in got)
            close([cupy.asnumpy(array) for array in got], WANT)
        with pytest.raises(InvalidArgument, match=r"input 'x': expected float32\[6, 4\], got float64"):
            session.run(None, {"x": cupy.asarray(X, "f8")})


class Foreign:
    """An array of another library: it offers one of the two ways to share memory."""

    def __init__(self, array: Any, way: str) -> None:
        self.array = array
        if way == "dlpack":
            self.__dlpack__ = array.__dlpack__
            self.__dlpack_device__ = array.__dlpack_device__
        else:
            self.__cuda_array_interface__ = array.__cuda_array_interface__


@pytest.mark.parametrize(("way", "dtype"), [
    ("dlpack", "float32"), ("dlpack", "float16"), ("dlpack", "bfloat16"), ("dlpack", "int64"), ("dlpack", "bool"),
    ("interface", "float32"), ("interface", "int64"),
])  # fmt: skip
def test_memory_of_other_libraries_is_shared(way: str, dtype: str, gpus: Any) -> None:
    gpus(1)
    import cupy

    from onnxmesh.runtime.cuda.foreign import as_array, as_host_array

    array = cupy.arange(6).reshape(2, 3).astype(np.dtype(dtype))
    got = as_array(Foreign(array, way))
    assert (got.data.ptr, got.dtype, got.shape, got.strides) == (
        array.data.ptr,
        array.dtype,
        array.shape,
        array.strides,
    )
    np.testing.assert_array_equal(as_host_array(Foreign(array, way)).astype(float), array.get().astype(float))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_binding_on_every_rank(mesh: Mesh, gpus: Any, tmp_path: Path) -> None:
    gpus(mesh.size)
    save(plan(mesh), tmp_path / "m.plan", MODEL.__getitem__)
    run_ranks_apart("bind", tmp_path, mesh.size)


def test_a_communicator_of_the_caller_s_own(gpus: Any, tmp_path: Path) -> None:
    gpus(4)
    save(plan(MESHES[2]), tmp_path / "m.plan", MODEL.__getitem__)
    run_ranks_apart("wrap", tmp_path, 4)


def test_ranks_with_different_plans_do_not_start(gpus: Any, tmp_path: Path) -> None:
    gpus(2)
    save(plan(MESHES[1]), tmp_path / "m.plan", MODEL.__getitem__)
    run_ranks_apart("differ", tmp_path, 2)


def run_ranks_apart(what: str, folder: Path, ranks: int) -> None:
    """Every rank a process (see session_rank.py), which must end well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, str(Path(__file__).with_name("session_rank.py")), what, str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=200)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)


def test_a_run_follows_the_caller_s_stream(gpus: Any) -> None:
    gpus(1)
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with Session(plan(Mesh.of()), "cuda", weights=MODEL.__getitem__) as session, stream:
        x, y = cupy.zeros((6, 4), "f4"), cupy.zeros((6, 4), "f4")
        binding = session.bind({"x": x}, {"y": y})
        big = cupy.ones((4096, 4096), "f4")
        for factor in range(1, 7):
            for _ in range(20):
                big *= 1.0  # the stream is busy when the run is asked for
            x[...] = cupy.asarray(X) * factor
            outputs = binding.run(stream=(stream, stream.ptr)[factor % 2])
            assert outputs["y"] is y
            total = y + 0  # follows the run
            x.fill(0)
            stream.synchronize()
            np.testing.assert_allclose(total.get(), WANT[0] * factor, 1e-5, 1e-5)
        (result,) = session.run(["y"], {"x": cupy.asarray(X)}, stream=stream)
        stream.synchronize()
        np.testing.assert_allclose(result.get(), WANT[0], 1e-5, 1e-5)


def test_weights_are_one_allocation_and_what_the_files_hold(gpus: Any, tmp_path: Path) -> None:
    gpus(1)
    from onnxmesh.runtime.cuda import upload

    rng = np.random.default_rng(0)
    values = {f"big{i}": rng.standard_normal((size, 1000)).astype("f4") for i, size in enumerate((1, 3, 4000, 7000))}
    weights = tuple(Weight(name, "float32", x.shape, (), {"op": "source", "name": name}) for name, x in values.items())
    big = replace(plan(Mesh.of()), weights=(*plan(Mesh.of()).weights, *weights))
    save(big, tmp_path / "m.plan", {**values, **MODEL}.__getitem__)
    stored = load(tmp_path / "m.plan")
    for source in (tmp_path / "m.plan", {**values, **MODEL}.__getitem__):
        got = upload.load(source, stored, stored.mesh.coordinate(0))
        for array, want in zip(got, [*MODEL.values(), *values.values()]):
            np.testing.assert_array_equal(array.get(), want)
            assert array.data.ptr % 256 == 0
        assert len({array.data.mem.ptr for array in got}) == 1
    data = bytearray((tmp_path / "m.plan/weights/all.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "m.plan/weights/all.safetensors").write_bytes(data)
    with pytest.raises(PlanError, match=r"big3.* is damaged"):
        upload.load(tmp_path / "m.plan", stored, stored.mesh.coordinate(0))


def test_random_weights_are_those_of_the_host(gpus: Any) -> None:
    gpus(1)
    with Session(plan(Mesh.of()), weights="random") as host, Session(plan(Mesh.of()), "cuda", weights="random") as gpu:
        for mine, theirs in zip(gpu.engines[0]._weights, host.engines[0]._weights):
            np.testing.assert_array_equal(mine.get(), theirs)
        close(gpu.run(None, {"x": X}), host.run(None, {"x": X}))
