"""One rank of the sessions in test_gpu_session.py: `session_rank.py bind|wrap|differ FOLDER`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import cupy  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from test_session import HIDDEN, MODEL, WANT, X  # noqa: E402

from onnxmesh.runtime.cuda.device import import_nccl  # noqa: E402
from onnxmesh.runtime.errors import PlanError  # noqa: E402
from onnxmesh.runtime.nccl import NcclCommunicator  # noqa: E402
from onnxmesh.runtime.plan import Plan  # noqa: E402
from onnxmesh.runtime.rendezvous import World, find_place  # noqa: E402
from onnxmesh.runtime.serialize import load  # noqa: E402
from onnxmesh.runtime.session import Session  # noqa: E402

ROWS = ([0, 2, 3], [1, 4, 5])


def bind(plan: Plan, world: World) -> None:
    """Inputs and outputs in memory of this rank's, whole and as shards."""
    at, mesh = plan.mesh.coordinate(world.rank), plan.mesh
    rows = ROWS[at["cp"]] if mesh.axis_size("cp") > 1 else list(range(6))
    width = 8 // mesh.axis_size("tp")
    own = HIDDEN[rows][:, width * at["tp"] :][:, :width]
    cupy.cuda.Device(world.local_rank).use()
    with NcclCommunicator(mesh, world) as comm, Session(plan, "cuda", communicator=comm) as session:
        for given in (X, X[rows]):
            x, y = cupy.asarray(given), cupy.zeros((6, 4), "f4")
            binding = session.bind({"x": x}, {"y": y})
            for factor in (1, 2, 3, 4):
                x[...] = cupy.asarray(given) * factor
                outputs = binding.run()
                np.testing.assert_allclose(y.get(), WANT[0] * factor, 1e-4, 1e-4)
                np.testing.assert_allclose(outputs["hidden"].get(), own * factor, 1e-4, 1e-4)
        got = session.run(["y"], {"x": X})
        np.testing.assert_allclose(got[0], WANT[0], 1e-4, 1e-4)
        np.testing.assert_array_equal(x.get(), X[rows] * 4)
        assert session.load_report.nbytes == sum(value.nbytes for value in MODEL.values()) // mesh.axis_size("tp")


def wrap(plan: Plan, world: World) -> None:
    """On an NCCL communicator that was made here, and is still there afterwards."""
    nccl = import_nccl()
    cupy.cuda.Device(world.local_rank).use()
    identity = bytes.fromhex(world.allgather(nccl.get_unique_id().hex())[0])
    whole = nccl.NcclCommunicator(world.size, identity, world.rank)
    with (
        NcclCommunicator.wrap(plan.mesh, whole, timeout=20) as comm,
        Session(plan, "cuda", communicator=comm) as session,
    ):
        for _ in range(4):
            np.testing.assert_allclose(session.run(["y"], {"x": X})[0], WANT[0], 1e-4, 1e-4)
    one = cupy.ones(1, "f4")
    stream = cupy.cuda.get_current_stream()
    whole.allReduce(one.data.ptr, one.data.ptr, 1, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream.ptr)
    assert float(one[0]) == world.size
    whole.destroy()


def differ(plan: Plan, world: World) -> None:
    """Rank 1 has another plan."""
    program = plan.programs[0]
    other = replace(plan, programs=(replace(program, arena_bytes=program.arena_bytes + 256),))
    with NcclCommunicator(plan.mesh, world) as comm:
        with pytest.raises(PlanError, match=r"do not run the same: plan is \w+ on rank 0, \w+ on rank 1$"):
            Session(other if world.rank else plan, "cuda", communicator=comm)
        world.allgather("done")


if __name__ == "__main__":
    with World(find_place(), timeout=30) as everyone:
        {"bind": bind, "wrap": wrap, "differ": differ}[sys.argv[1]](load(Path(sys.argv[2]) / "m.plan"), everyone)
