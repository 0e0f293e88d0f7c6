"""Starts the ranks of a job: `rank.py` once for every GPU, until its list of entries is done."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]
_PROGRAM = Path(__file__).with_name("rank.py")
_SECONDS = 240


def run(kind: str, ranks: int, entries: Sequence[Entry], out: Path) -> dict[str, Any]:
    """The results of all entries by key. An entry that fails ends the ranks: the rest goes to new ones."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    left = list(entries)
    while left:
        code, output = _start(kind, ranks, left, out)
        found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json") if path.name != "job.json"}
        done = [entry["key"] for entry in left if entry["key"] in found]
        results |= {key: found[key] for key in done}
        if len(done) < len(left) and code == 0:
            raise RuntimeError(f"the ranks left out {left[0]['key']}: {output}")
        if len(done) < len(left) and not (done and "error" in found[done[-1]]):
            key = left[len(done)]["key"]
            results[key] = {"error": f"the ranks ended with status {code}: {output[-3000:]}"}
            done.append(key)
        left = left[len(done) :]
    return results


def _start(kind: str, ranks: int, entries: Sequence[Entry], out: Path) -> tuple[int, str]:
    job = out / "job.json"
    job.write_text(json.dumps({"kind": kind, "entries": list(entries), "out": str(out)}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, str(_PROGRAM), str(job)]
        log = (out / f"rank{rank}.log").open("wb")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + _SECONDS
    codes = [_wait(process, end) for process in processes]
    output = "\n".join((out / f"rank{rank}.log").read_text(errors="replace")[-2000:] for rank in range(ranks))
    return max(codes, key=abs), output


def _wait(process: subprocess.Popen[bytes], end: float) -> int:
    """The exit code; a process that does not end in time is killed."""
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
