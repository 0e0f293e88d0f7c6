"""A process that is going to be disturbed: one rank where RANK says so, else one that controls its ranks.

python fault_rank.py PLAN DEVICE TIMEOUT        says `running` once it runs, and what ends it
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from store_ranks import StoreCommunicator  # noqa: E402

from onnxmesh.runtime import io  # noqa: E402
from onnxmesh.runtime.comm import Communicator  # noqa: E402
from onnxmesh.runtime.cuda import ranks  # noqa: E402
from onnxmesh.runtime.errors import OnnxMeshError  # noqa: E402
from onnxmesh.runtime.mesh import Mesh  # noqa: E402
from onnxmesh.runtime.rendezvous import World, find_place  # noqa: E402
from onnxmesh.runtime.serialize import load  # noqa: E402
from onnxmesh.runtime.session import Session  # noqa: E402

WARM = 5
"""Runs before it says that it runs: the first ones prepare."""
_CPU_WORKER = Path(__file__).parents[1] / "cpu_worker.py"
LONGEST = 120.0
"""Seconds after which it ends by itself, if nothing disturbs it."""


def main(folder: str, device: str, timeout: float) -> int:
    """Run a plan until something happens."""
    try:
        with ExitStack() as stack:
            plan = load(folder)
            communicator = _communicator(stack, plan.mesh, device, timeout)
            where = "cuda" if communicator is None else device
            session = stack.enter_context(Session(plan, where, communicator=communicator, timeout=timeout))
            feeds, end, runs = io.random_inputs(plan, 0), time.monotonic() + LONGEST, 0
            while time.monotonic() < end:
                session.run(None, feeds)
                runs += 1
                if runs == WARM:
                    print("running", flush=True)
    except OnnxMeshError as error:
        print(f"error: {error.args[0]}", flush=True)
        return error.exit_code
    return 0


def _communicator(stack: ExitStack, mesh: Mesh, device: str, timeout: float) -> Communicator | None:
    place = find_place()
    if place is None:
        if device == "cpu":
            ranks.device_count, ranks._WORKER = lambda: mesh.size, (str(_CPU_WORKER),)
        return None
    world = stack.enter_context(World(place, timeout))
    if device == "cpu":
        return stack.enter_context(StoreCommunicator(mesh, world))
    from onnxmesh.runtime.nccl import NcclCommunicator

    return stack.enter_context(NcclCommunicator(mesh, world))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
