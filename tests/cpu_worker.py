"""The process of a rank that a session controls, as runtime/cuda/worker.py, but on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from store_ranks import StoreCommunicator

from onnxmesh.runtime.cuda import worker
from onnxmesh.runtime.session import Session


def on_cpu(plan: Any, device: str, **given: Any) -> Session:
    """A session on the host in place of one on a GPU."""
    return Session(plan, "cpu", **given)


worker.NcclCommunicator = StoreCommunicator  # type: ignore[assignment,misc]
worker.Session = on_cpu  # type: ignore[assignment,misc]

if __name__ == "__main__":
    sys.exit(worker.main(int(sys.argv[1])))
