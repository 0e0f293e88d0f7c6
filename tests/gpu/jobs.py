"""Starts the ranks of a job: `rank.py` once for every GPU, until its list of entries is done."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]
_PROGRAM = Path(__file__).with_name("rank.py")
_SECONDS = 120
"""Ranks that give no result for so long are ended."""
_USUAL = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ONNXMESH_TUNE": "0"}
"""Many processes: one thread each. The fastest algorithm does not matter to a test."""
_STARTS = 12
"""After so many starts, what is left of a list is not run."""


def gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        import cupy

        return [str(index) for index in range(cupy.cuda.runtime.getDeviceCount())]
    except Exception:
        return []


def run_beside(kind: str, ranks: int, entries: Sequence[Entry], out: Path, gpus: Sequence[str]) -> dict[str, Any]:
    """As `run`, the entries divided among as many jobs at once as there are groups of so many GPUs."""
    groups = [gpus[first : first + ranks] for first in range(0, len(gpus) - ranks + 1, ranks)]
    if not groups:
        raise ValueError(f"{ranks} ranks need {ranks} GPUs, there are {len(gpus)}")
    bounds = [len(entries) * number // len(groups) for number in range(len(groups) + 1)]
    lists = [entries[first:last] for first, last in pairwise(bounds)]  # neighbours share kernels
    with ThreadPoolExecutor(len(groups)) as pool:
        jobs = [
            pool.submit(run, kind, ranks, part, out / f"job{number}", group)
            for number, (part, group) in enumerate(zip(lists, groups))
        ]
        return {key: result for job in jobs for key, result in job.result().items()}


def run(kind: str, ranks: int, entries: Sequence[Entry], out: Path, gpus: Sequence[str] = ()) -> dict[str, Any]:
    """The results of all entries by key. An entry that fails ends the ranks: the rest goes to new ones.

    Args:
        ranks: how many processes.
        gpus: the GPUs that they see; none: all.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    left = list(entries)
    for _ in range(_STARTS):
        if not left:
            break
        code, output = _start(kind, ranks, left, out, gpus)
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
    return results | {entry["key"]: {"error": "not run: too many others failed"} for entry in left}


def _start(kind: str, ranks: int, entries: Sequence[Entry], out: Path, gpus: Sequence[str]) -> tuple[int, str]:
    job = out / "job.json"
    job.write_text(json.dumps({"kind": kind, "entries": list(entries), "out": str(out)}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    usual = _USUAL if kind in ("plans", "host") else {}
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        environment = {**usual, **os.environ, **seen, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, str(_PROGRAM), str(job)]
        with (out / f"rank{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = _wait(processes, out)
    output = "\n".join((out / f"rank{rank}.log").read_text(errors="replace")[-2000:] for rank in range(ranks))
    return max(codes, key=abs), output


def _wait(processes: Sequence[subprocess.Popen[bytes]], out: Path) -> list[int]:
    """The exit codes; processes that give no result in time are killed."""
    seen, since = -1, time.monotonic()
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        count = len(list(out.glob("*.json")))
        if count != seen:
            seen, since = count, time.monotonic()
        if time.monotonic() - since > _SECONDS:
            for process in processes:
                process.kill()
    return [process.wait() for process in processes]
