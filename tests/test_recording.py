"""Recording what a rank sends, with the other ranks or without them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime.comm import CollectiveRecord, Communicator, RecordingCommunicator
from onnxmesh.runtime.host import LoneCommunicator
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.threads import run_ranks

Array = Any


def test_recording_notes_each_call_and_passes_it_on() -> None:
    def act(comm: Communicator) -> tuple[list[CollectiveRecord], Array]:
        recorder = RecordingCommunicator(comm)
        x = recorder.all_reduce(np.ones((2, 4), ml_dtypes.bfloat16), "tp", "max")
        x = recorder.all_gather(x, ("cp", "tp"), dim=1)
        recorder.barrier()
        return recorder.records, x

    records, x = run_ranks(Mesh.of(cp=2, tp=2), act)[0]
    assert x.shape == (2, 16)
    assert records == [
        CollectiveRecord("all_reduce", "tp", 16, "bfloat16", (2, 4), "max"),
        CollectiveRecord("all_gather", ("cp", "tp"), 16, "bfloat16", (2, 4)),
        CollectiveRecord("barrier", None, 0, "", ()),
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_alone_sees_the_right_shapes(rank: int) -> None:
    comm = RecordingCommunicator(LoneCommunicator(Mesh.of(tp=4), rank))
    x = np.ones((8, 4), np.float32)
    like = np.empty((2, 4), np.float32)
    shapes = {
        "all_reduce": comm.all_reduce(np.ones((1 << 15) + 1), "tp").shape,
        "reduce_scatter": comm.reduce_scatter(x, "tp").shape,
        "all_gather": comm.all_gather(x, "tp", dim=1).shape,
        "all_to_all": comm.all_to_all(x, "tp", 0, 1).shape,
        "broadcast": comm.broadcast(x, "tp").shape,
        "scatter": comm.scatter(None if rank else x, "tp", like=like).shape,
        "shift": comm.shift(x, "tp").shape,
    }
    assert shapes == {
        "all_reduce": ((1 << 15) + 1,),
        "reduce_scatter": (2, 4),
        "all_gather": (8, 16),
        "all_to_all": (2, 16),
        "broadcast": (8, 4),
        "scatter": (2, 4),
        "shift": (8, 4),
    }
    gathered, reduced = comm.gather(x, "tp"), comm.reduce(x, "tp")
    comm.barrier("tp")
    comm.close()
    assert (gathered is None, reduced is None) == (rank > 0, rank > 0)
    assert [record.kind for record in comm.records] == [*shapes, "gather", "reduce", "barrier"]
