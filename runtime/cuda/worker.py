"""One rank as a process that another one controls (see runtime/cuda/ranks.py): `worker FD`."""

from __future__ import annotations

import socket
import sys

from onnxmesh.runtime import frames
from onnxmesh.runtime.nccl import NcclCommunicator
from onnxmesh.runtime.rendezvous import World, find_place
from onnxmesh.runtime.serialize import load
from onnxmesh.runtime.session import Session


def main(descriptor: int) -> int:
    """Load the plan that the first frame names, then run until the socket closes; the exit code."""
    with socket.socket(fileno=descriptor) as control:
        try:
            return _serve(control)
        except Exception as error:
            _report(control, error)
            return getattr(error, "exit_code", 1)


def _serve(control: socket.socket) -> int:
    frame = frames.receive(control)
    if frame is None:
        return 0
    request = frame[0]
    timeout = float(request["timeout"])
    plan = load(request["plan"])
    world = World(find_place(), timeout, serve=False)
    with (
        world,
        NcclCommunicator(plan.mesh, world) as rank,
        Session(plan, "cuda", weights=request["weights"], communicator=rank, io="root") as session,
    ):
        world.allgather("loaded")
        frames.send(control, {})
        while (frame := frames.receive(control)) is not None:
            if "measure" in frame[0]:
                frames.send(control, session.measure(frame[0]["measure"])[rank.rank])
                continue
            names = frame[0]["run"]
            outputs = session.run(names, frame[1] if rank.rank == 0 else None)
            frames.send(control, {}, dict(zip(names, outputs)))
    return 0


def _report(control: socket.socket, error: Exception) -> None:
    """Tell the controlling process, which raises it."""
    text, hint = str(error.args[0] if error.args else error), getattr(error, "hint", "")
    try:
        frames.send(control, {"kind": type(error).__name__, "error": text, "hint": hint})
    except OSError:
        print(f"onnxmesh: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
