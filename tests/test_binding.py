"""Bindings: a session on fixed memory, which is read and written in place where it can be."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_session import HIDDEN, MODEL, WANT, X, close, plan

from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.errors import InvalidArgument, RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.random_weights import DEVIATION, random_shard
from onnxmesh.runtime.session import Session
from onnxmesh.runtime.threads import run_ranks

MESHES = [Mesh.of(), Mesh.of(tp=2), Mesh.of(tp=2, cp=2)]
ROWS = ([0, 2, 3], [1, 4, 5])
"""The rows of x that the ranks along cp hold."""


def values(outputs: Any) -> list[np.ndarray]:
    return [outputs[name] for name in ("y", "hidden", "partial")]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_new_values_in_the_same_memory(mesh: Mesh) -> None:
    x, y = X.copy(), np.empty((6, 4), np.float32)
    with Session(plan(mesh), weights=MODEL.__getitem__) as session:
        binding = session.bind({"x": x}, {"y": y})
        for factor in (1, 2, 3):
            x[...] = X * factor
            outputs = binding.run()
            assert outputs["y"] is y
            close(values(outputs), [want * factor for want in WANT])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_memory_that_cannot_be_used_in_place_is_copied(mesh: Mesh) -> None:
    x, y = np.asfortranarray(X), np.empty((4, 6), np.float32).T
    with Session(plan(mesh), weights=MODEL.__getitem__) as session:
        binding = session.bind({"x": x}, {"y": y})
        for factor in (1, 2):
            x[...] = X * factor
            close(values(binding.run()), [want * factor for want in WANT])
        np.testing.assert_allclose(y, WANT[0] * 2, 1e-5, 1e-5)


def test_one_rank_reads_and_writes_in_place() -> None:
    def body(comm: Communicator) -> None:
        x, y, hidden = X.copy(), np.empty((6, 4), np.float32), np.empty((6, 4), np.float32)
        with Session(plan(Mesh.of(tp=2)), weights=MODEL.__getitem__, communicator=comm) as session:
            binding = session.bind({"x": x}, {"y": y, "hidden": hidden})
            engine, program = session.engines[comm.rank], session.plan.programs[0]
            assert engine.array(program.inputs[0].buffer).ctypes.data == x.ctypes.data
            assert engine.array(program.outputs[0].buffer).ctypes.data == y.ctypes.data
            for factor in (1, 2):
                x[...] = X * factor
                binding.run()
                np.testing.assert_allclose(y, WANT[0] * factor, 1e-5, 1e-5)
                np.testing.assert_allclose(hidden, HIDDEN[:, 4 * comm.rank :][:, :4] * factor, 1e-5, 1e-5)

    run_ranks(Mesh.of(tp=2), body, timeout=20)


def test_a_rank_may_give_its_own_shard() -> None:
    def body(comm: Communicator) -> None:
        cp, tp = comm.mesh.coordinate(comm.rank)["cp"], comm.mesh.coordinate(comm.rank)["tp"]
        shard = X[ROWS[cp]]
        own = HIDDEN[ROWS[cp]][:, 4 * tp :][:, :4]
        with Session(plan(), weights=MODEL.__getitem__, communicator=comm) as session:
            for x in (shard, X):
                y, hidden = session.run(["y", "hidden"], {"x": x})
                np.testing.assert_allclose(y, WANT[0], 1e-5, 1e-5)
                np.testing.assert_allclose(hidden, own, 1e-5, 1e-5)
            binding = session.bind({"x": shard})
            np.testing.assert_allclose(binding.run()["hidden"], own, 1e-5, 1e-5)

    run_ranks(Mesh.of(tp=2, cp=2), body, timeout=20)


def test_a_plain_run_leaves_the_bound_memory_alone() -> None:
    x, y = X.copy(), np.zeros((6, 4), np.float32)
    with Session(plan(Mesh.of()), weights=MODEL.__getitem__) as session:
        binding = session.bind({"x": x}, {"y": y})
        close(session.run(["y"], {"x": X * 5}), [WANT[0] * 5])
        assert session.bound is None
        np.testing.assert_array_equal(x, X)
        assert not y.any()
        close(values(binding.run()), WANT)
        assert session.bound is binding


@pytest.mark.parametrize(("inputs", "outputs", "message"), [
    ({}, {}, "input 'x' is missing"),
    ({"x": X}, {"z": X}, "there is no output 'z'"),
    ({"x": X.astype("f8")}, {}, r"input 'x': expected float32\[6, 4\], got float64"),
    ({"x": X}, {"y": X.T.copy()}, r"output 'y': expected float32\[6, 4\], got float32\[4, 6\]"),
])  # fmt: skip
def test_memory_that_does_not_fit(inputs: Any, outputs: Any, message: str) -> None:
    with Session(plan(), weights=MODEL.__getitem__) as session, pytest.raises(InvalidArgument, match=message):
        session.bind(inputs, outputs)


def test_as_one_rank_an_output_is_the_shard() -> None:
    def body(comm: Communicator) -> None:
        session = Session(plan(), weights=MODEL.__getitem__, communicator=comm)
        with session, pytest.raises(InvalidArgument, match=r"output 'hidden' has the shape \[3, 4\] on this rank"):
            session.bind({"x": X}, {"hidden": np.empty((6, 8), np.float32)})

    run_ranks(Mesh.of(tp=2, cp=2), body, timeout=20)


def test_what_the_cpu_does_not_have_is_refused() -> None:
    with Session(plan(), weights=MODEL.__getitem__) as session:
        with pytest.raises(InvalidArgument, match="no streams"):
            session.run(None, {"x": X}, stream=0)
        binding = session.bind({"x": X})
        with pytest.raises(InvalidArgument, match="no streams"):
            binding.run(stream=0)
    with pytest.raises(RunError, match="closed"):
        binding.run()
    with (
        Session(plan(), weights=MODEL.__getitem__, io="root") as session,
        pytest.raises(InvalidArgument, match="rank 0"),
    ):
        session.bind({"x": X})


def test_outputs_may_stay_in_the_session_s_memory() -> None:
    with Session(plan(Mesh.of()), weights=MODEL.__getitem__) as session:
        close(session.run(None, {"x": X}, device_outputs=True), WANT)


def test_random_weights_are_the_same_again_and_normal() -> None:
    with Session(plan(), weights="random") as session:
        first = session.run(None, {"x": X})
    with Session(plan(), weights="random") as session:
        close(session.run(None, {"x": X}), first)
        assert session.load_report.nbytes == 4 * 2 * 4 * 4 * 4  # two weights of 4 x 4 floats on each of four ranks
    many = random_shard("w", "all", np.dtype(ml_dtypes.bfloat16), (1500, 1000)).astype(np.float32)
    assert abs(many.mean()) < 1e-4
    assert abs(many.std() - DEVIATION) < 1e-4
    assert not random_shard("w", "all", np.dtype(np.int64), (3,)).any()
    assert random_shard("w", "tp0", np.dtype(np.float32), (3,))[0] != random_shard("w", "tp1", np.dtype("f4"), (3,))[0]
