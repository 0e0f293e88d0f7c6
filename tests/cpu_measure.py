"""A rank of the doctor's measurement, as runtime/cuda/measure.py, but on the CPU and with little to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from store_ranks import StoreCommunicator

from onnxmesh.runtime import nccl
from onnxmesh.runtime.cuda import device, measure
from onnxmesh.runtime.device import HostDevice
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.rendezvous import World


class Ranks(StoreCommunicator):
    """With what a measurement needs of NCCL's."""

    groups = None

    def __init__(self, mesh: Mesh, world: World) -> None:
        super().__init__(mesh, world)
        self._world = world

    def on(self, mesh: Mesh) -> Ranks:
        """The same ranks as another mesh."""
        assert mesh == self.mesh
        return self


def small(bench: measure.Bench, on: Any) -> dict[str, Any]:
    """A profile of a few small things."""
    return {
        "gemm": list(measure.gemms(bench, {"float32": ((8, 8, 8), (16, 16, 16), (4, 32, 32))})),
        "attention": list(measure.attentions(bench, {"float32": ((2, 2, 8, 8, 8, False), (2, 2, 8, 8, 8, True))})),
        "memory": list(measure.sums(bench, (64, 256))),
        "collectives": list(measure.collectives(bench, on, (64, 256), [2])),
        "contention": 1.0,
    }


nccl.NcclCommunicator = Ranks  # type: ignore[assignment,misc]
device.CudaDevice = lambda index, groups: HostDevice()  # type: ignore[assignment,misc]
measure.ENOUGH, measure.CHECKED, measure.profile = 1.0, (64,), small

if __name__ == "__main__":
    if sys.argv[1] == "fail":
        sys.exit("error: this one fails")
    sys.exit(measure.main(*sys.argv[1:]))
