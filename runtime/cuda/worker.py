"""One rank as a process that another one controls (see runtime/cuda/ranks.py): `worker FD`."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time

from onnxmesh.runtime import frames
from onnxmesh.runtime.nccl import NcclCommunicator
from onnxmesh.runtime.rendezvous import World, find_place
from onnxmesh.runtime.serialize import load
from onnxmesh.runtime.session import Session

_GRACE = 5.0
"""Seconds that this process gets to end by itself once the controlling one is gone."""
_LOADING = 300.0
"""Seconds, besides the timeout, that ranks may take to load after each other."""


def main(descriptor: int) -> int:
    """Load the plan that the first frame names, then run until the socket closes; the exit code."""
    with socket.socket(fileno=descriptor) as control:
        threading.Thread(target=_leash, args=(control,), name="onnxmesh-leash", daemon=True).start()
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
    plan, graph = load(request["plan"]), bool(request["graph"])
    world = World(find_place(), float(request["timeout"]), serve=False)
    with (
        world,
        NcclCommunicator(plan.mesh, world) as rank,
        Session(plan, "cuda", weights=request["weights"], communicator=rank, io="root", graph=graph) as session,
    ):
        world.allgather("ready", _LOADING)
        frames.send(control, {"nbytes": session.load_report.nbytes, "seconds": session.load_report.seconds})
        while (frame := frames.receive(control)) is not None:
            if "measure" in frame[0]:
                frames.send(control, session.measure(frame[0]["measure"])[rank.rank])
                continue
            names = frame[0]["run"]
            outputs = session.run(names, frame[1] if rank.rank == 0 else None)
            frames.send(control, {}, dict(zip(names, outputs)))
    return 0


def _leash(control: socket.socket) -> None:
    """End this process if the controlling one goes, whatever it is doing then: loading, or waiting for another rank."""
    poll = select.poll()
    poll.register(control.fileno(), select.POLLRDHUP)
    poll.poll()
    time.sleep(_GRACE)
    os._exit(1)


def _report(control: socket.socket, error: Exception) -> None:
    """Tell the controlling process, which raises it."""
    text, hint = str(error.args[0] if error.args else error), getattr(error, "hint", "")
    code = getattr(error, "code", "")
    try:
        frames.send(control, {"kind": type(error).__name__, "error": text, "hint": hint, "code": code})
    except OSError:
        print(f"error: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
