"""Collectives from buffer to buffer, as the GPU engine prepares them, against the same on NumPy arrays."""

from __future__ import annotations

import cupy
import numpy as np
from test_exchange import cases, samples

from onnxmesh.runtime.collectives import execute
from onnxmesh.runtime.cuda.collectives import Staging, prepare
from onnxmesh.runtime.cuda.device import CudaDevice
from onnxmesh.runtime.nccl import NcclCommunicator
from onnxmesh.runtime.plan import Collective
from onnxmesh.runtime.threads import run_ranks

STAGING = 1 << 20


def check_prepared(comm: NcclCommunicator, axis: str) -> tuple[list[str], int]:
    """What went wrong, and how many checks there were. `axis` spans the whole mesh."""
    device, wrong, count = CudaDevice(comm.groups.world.local_rank, comm.groups), [], 0
    with device.scope():
        staging = Staging(STAGING)
        for kind, attrs, held, given in cases(comm.mesh.size):
            for batch, dtype in ((1, "bfloat16"), (2, "float32"), (1, "int64"), (2, "float16")):
                item = Collective(kind, axis, (0,), (1,), attrs)
                pieces = samples(held, given, batch, comm.mesh.size)
                want = run_ranks(comm.mesh, lambda c: execute(item, pieces[c.rank], c, np))[comm.rank]  # noqa: B023
                wrong += _differences(device, item, pieces[comm.rank], want, dtype, comm, staging)
                count += 2
    return wrong, count


def _differences(
    device: CudaDevice, item: Collective, piece: np.ndarray, want: np.ndarray, dtype: str, comm: NcclCommunicator,
    staging: Staging,
) -> list[str]:  # fmt: skip
    """Launched once, then three times from one graph; sums of small whole numbers are exact in every dtype."""
    x = cupy.asarray(piece.astype(dtype))
    out = cupy.empty(want.shape, dtype)
    out.view("u1").fill(0xFF)
    launch = prepare(item, [x], [out], comm, staging)
    if launch is None:
        return [f"{item.kind} {item.attrs} {dtype} is not prepared"]
    found = []
    launch(int(device.stream.ptr))
    found.append(device.get(out))
    out.view("u1").fill(0xFF)
    device.stream.begin_capture()
    launch(int(device.stream.ptr))
    graph = device.stream.end_capture()
    for _ in range(3):
        graph.launch(device.stream)
    found.append(device.get(out))
    return [
        f"{item.kind} {item.attrs} {dtype} {how}: {got.reshape(-1)[:8]} for {want.reshape(-1)[:8]}"
        for how, got in zip(("launched", "in a graph"), found)
        if not np.array_equal(got.astype(np.float64), want.astype(dtype).astype(np.float64))
    ]
