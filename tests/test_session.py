"""Sessions: a plan runs as a model does, on threads and as one rank of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.errors import InvalidArgument, PlanError, RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial, Segment, Shard
from onnxmesh.runtime.plan import Buffer, Collective, Launch, Plan, Port, Program, Spec, Weight
from onnxmesh.runtime.serialize import save
from onnxmesh.runtime.session import NodeArg, Session
from onnxmesh.runtime.threads import run_ranks

MESH = Mesh.of(tp=2, cp=2)
RNG = np.random.default_rng(3)
MODEL = {"w1": RNG.standard_normal((4, 8)).astype(np.float32), "w2": RNG.standard_normal((8, 4)).astype(np.float32)}
X = RNG.standard_normal((6, 4)).astype(np.float32)
ROWS: Spec = (("cp", Shard(0, (Segment(2), Segment(4)))),)
COLUMNS: Spec = (*ROWS, ("tp", Shard.plain(1, 8)))


def plan(mesh: Mesh = MESH) -> Plan:
    """relu(x w1) w2 with the rows of x sharded on cp and the features on tp; also the hidden layer."""
    features = (("tp", Shard.plain(1, 8)),)
    weights = (
        Weight("w1", "float32", (4, 8), features, {"op": "source", "name": "w1"}),
        Weight("w2", "float32", (8, 4), (("tp", Shard.plain(0, 8)),), {"op": "source", "name": "w2"}),
    )
    rows, hidden = 6 // mesh.axis_size("cp"), 8 // mesh.axis_size("tp")
    buffers = (
        Buffer("float32", (rows, 4), "input", source=0),
        Buffer("float32", (4, hidden), "weight", source=0),
        Buffer("float32", (hidden, 4), "weight", source=1),
        Buffer("float32", (rows, hidden), "arena", 0),
        Buffer("float32", (rows, hidden), "arena", 256),
        Buffer("float32", (rows, 4), "arena", 512),
        Buffer("float32", (rows, 4), "arena", 768),
        Buffer("float32", (6, 4), "arena", 1024),
    )
    instructions = (
        Launch("MatMul", (0, 1), (3,), node="fc1"),
        Launch("Relu", (3,), (4,), node="act"),
        Launch("MatMul", (4, 2), (5,), node="fc2"),
        Collective("AllReduce", "tp", (5,), (6,), {"reduce": "sum"}, "fc2"),
        Collective("AllGather", "cp", (6,), (7,), {"dim": 0, "segments": [[2, 1], [4, 1]]}, "fc2"),
    )
    outputs = (
        Port("y", "float32", (6, 4), (), 7),
        Port("hidden", "float32", (6, 8), COLUMNS, 4),
        Port("partial", "float32", (6, 4), (*ROWS, ("tp", Partial())), 5),
    )
    program = Program({}, (Port("x", "float32", (6, 4), ROWS, 0),), outputs, buffers, instructions, 1200)
    return Plan(mesh, weights, (program,))


HIDDEN = np.maximum(X @ MODEL["w1"], 0)
WANT = [HIDDEN @ MODEL["w2"], HIDDEN, HIDDEN @ MODEL["w2"]]


def close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)


@pytest.mark.parametrize("io", ["all", "root"])
@pytest.mark.parametrize("mesh", [Mesh.of(), Mesh.of(tp=2), Mesh.of(tp=2, cp=2), Mesh.of(tp=4, cp=2, dp=2)], ids=str)
def test_all_ranks_in_one_process(mesh: Mesh, io: Any) -> None:
    with Session(plan(mesh), weights=MODEL.__getitem__, io=io) as session:
        close(session.run(None, {"x": X}), WANT)
        close(session.run(["hidden"], {"x": X * 2}), [HIDDEN * 2])


def test_results_stay_when_the_session_runs_again() -> None:
    with Session(plan(), weights=MODEL.__getitem__) as session:
        first = session.run(None, {"x": X})
        session.run(None, {"x": X * 0})
        close(first, WANT)


def test_a_plan_in_a_folder(tmp_path: Path) -> None:
    save(plan(), tmp_path / "m.plan", MODEL.__getitem__)
    with Session(str(tmp_path / "m.plan")) as session:
        close(session.run(None, {"x": X}), WANT)
    save(plan(), tmp_path / "bare.plan")
    with Session(tmp_path / "bare.plan", weights=tmp_path / "m.plan") as session:
        close(session.run(None, {"x": X}), WANT)
    with pytest.raises(PlanError, match="missing"):
        Session(tmp_path / "bare.plan")
    with pytest.raises(PlanError, match="the weights of another plan"):
        Session(plan(Mesh.of(tp=2)), weights=tmp_path / "bare.plan")


def on_ranks(fn: Callable[[Communicator], Any], mesh: Mesh = MESH) -> list[Any]:
    return run_ranks(mesh, fn, timeout=20)


def test_one_rank_of_several_gives_whole_outputs_and_its_shards() -> None:
    def body(comm: Communicator) -> list[np.ndarray]:
        with Session(plan(), weights=MODEL.__getitem__, communicator=comm) as session:
            return session.run(["y", "hidden"], {"x": X})

    results = on_ranks(body)
    for y, _ in results:
        np.testing.assert_allclose(y, WANT[0], 1e-5, 1e-5)
    np.testing.assert_allclose(results[3][1], HIDDEN[[1, 4, 5]][:, 4:], 1e-5, 1e-5)


def test_with_io_root_only_rank_0_gives_and_gets() -> None:
    def body(comm: Communicator) -> list[np.ndarray]:
        with Session(plan(), weights=MODEL.__getitem__, communicator=comm, io="root") as session:
            return session.run(None, {"x": X} if comm.rank == 0 else None)

    results = on_ranks(body)
    close(results[0], WANT)
    assert results[1:] == [[], [], []]


def test_a_rank_s_wrong_input_ends_the_others() -> None:
    def body(comm: Communicator) -> list[np.ndarray]:
        with Session(plan(), weights=MODEL.__getitem__, communicator=comm) as session:
            return session.run(None, {"x": X[: 6 - comm.rank // 3]})

    with pytest.raises(InvalidArgument, match=r"input 'x': expected float32\[6, 4\], got float32\[5, 4\]"):
        on_ranks(body)


def test_a_rank_loads_its_own_shards_only(tmp_path: Path) -> None:
    save(plan(), tmp_path / "m.plan", MODEL.__getitem__)
    (tmp_path / "m.plan/weights/tp0.safetensors").unlink()

    def body(comm: Communicator) -> str:
        try:
            Session(tmp_path / "m.plan", communicator=comm).close()
        except PlanError as error:
            return str(error)
        return ""

    assert ["tp0" in message for message in on_ranks(body)] == [True, False, True, False]


def test_inputs_and_outputs_are_described_as_by_onnxruntime() -> None:
    with Session(plan(), weights=MODEL.__getitem__) as session:
        assert session.get_inputs() == [NodeArg("x", [6, 4], "tensor(float)")]
        assert [(out.name, out.shape) for out in session.get_outputs()][1] == ("hidden", [6, 8])


@pytest.mark.parametrize(("names", "feeds", "message"), [
    (None, {}, "input 'x' is missing"),
    (None, None, "input 'x' is missing"),
    (None, {"x": X, "z": X}, "there is no input 'z': the inputs are x"),
    (["z"], {"x": X}, "there is no output 'z': the outputs are y, hidden, partial"),
    (None, {"x": X.astype(np.float64)}, r"expected float32\[6, 4\], got float64\[6, 4\]"),
    (None, {"x": X.T}, r"expected float32\[6, 4\], got float32\[4, 6\]"),
])  # fmt: skip
def test_wrong_arguments_are_refused(names: Any, feeds: Any, message: str) -> None:
    with Session(plan(), weights=MODEL.__getitem__) as session:
        with pytest.raises(InvalidArgument, match=message):
            session.run(names, feeds)
        close(session.run(None, {"x": X}), WANT)


def test_a_failing_kernel_names_rank_instruction_and_node() -> None:
    program = plan().programs[0]
    wrong = replace(program.instructions[1], kernel="Transpose")
    steps = (program.instructions[0], wrong, *program.instructions[2:])
    broken = replace(plan(), programs=(replace(program, instructions=steps),))
    with Session(broken, weights=MODEL.__getitem__) as session:
        with pytest.raises(RunError, match=r"rank \d: instruction 1, Transpose of node 'act', failed on float32"):
            session.run(None, {"x": X})
        with pytest.raises(RunError):
            session.run(None, {"x": X})


def test_hooks_see_every_rank_s_instructions() -> None:
    seen: list[tuple[int, int]] = []
    hooks = lambda rank: lambda index, item, results: seen.append((rank, index))  # noqa: E731
    with Session(plan(), weights=MODEL.__getitem__, hooks=hooks) as session:
        session.run(None, {"x": X})
    assert sorted(seen) == [(rank, index) for rank in range(4) for index in range(5)]


@pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is installed")
@pytest.mark.parametrize("mesh", [Mesh.of(), MESH], ids=str)
def test_without_cupy_a_user_is_told_what_to_install(mesh: Mesh) -> None:
    with pytest.raises(RunError, match=r"CUDA needs CuPy.*pip install 'onnxmesh\[cuda13\]'"):
        Session(plan(mesh), device="cuda", weights=MODEL.__getitem__)


def test_what_cannot_be_is_refused() -> None:
    for device in ("tpu", "cpu:1", "cuda:x"):
        with pytest.raises(RunError, match=f"unknown device '{device}'"):
            Session(plan(), device=device, weights=MODEL.__getitem__)
    with pytest.raises(InvalidArgument, match="io is"):
        Session(plan(), weights=MODEL.__getitem__, io="none")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="has no weights"):
        Session(plan())
    with pytest.raises(PlanError, match="the plan is for the mesh"):
        run_ranks(Mesh.of(tp=4), lambda comm: Session(plan(), weights=MODEL.__getitem__, communicator=comm))
    session = Session(plan(), weights=MODEL.__getitem__)
    session.close()
    session.close()
    with pytest.raises(RunError, match="closed"):
        session.run(None, {"x": X})
