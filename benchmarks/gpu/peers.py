"""Time the peers on this host's GPUs.

python benchmarks/gpu/peers.py OUT.jsonl [--only flux-4608,llama] [--ranks 1 4] [--budget 500]

Needs torch; diffusers for FLUX, transformers for Llama. The works that matter most are timed first, and a line is
written for each configuration as soon as it is known. A configuration that takes too long is ended and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from shapes import BY_NAME, selected

HERE = Path(__file__).parent
LIBRARY = {"flux": "diffusers", "llama": "transformers"}


def main() -> None:
    """Time all that are asked for, for each number of ranks in one set of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="names of works, or how they begin, with commas")
    parser.add_argument("--ranks", type=int, nargs="*", help="numbers of GPUs; by default 1, 4, 2 and 8")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one configuration")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="tiny models on CPUs, to try the program")
    given = parser.parse_args()
    deadline = time.monotonic() + given.budget
    found = given.ranks or [1, 4, 2, 8]
    for ranks in [n for n in found if n <= (n if given.tiny else _gpus())]:
        jobs = _jobs(given, ranks)
        while jobs and time.monotonic() < deadline:
            jobs = _run(jobs, ranks, given, deadline)
        for job in jobs:
            _write(given.out, job, ranks, "not run: the time was used up")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _jobs(given: argparse.Namespace, ranks: int) -> list[str]:
    """WORK:CONFIGURATION of everything that can run here; says what cannot."""
    from peer_models import configurations

    jobs = []
    for work in selected(given.only):
        for name in configurations(work, ranks):
            job = f"{work.name}:{name}"
            if importlib.util.find_spec(LIBRARY[work.model]) is None:
                _write(given.out, job, ranks, f"not run: {LIBRARY[work.model]} is not installed")
            else:
                jobs.append(job)
    return sorted(jobs, key=lambda job: _first_of_its_work(job, ranks))


def _first_of_its_work(job: str, ranks: int) -> bool:
    """Every work's best configuration comes before any work's second; Ulysses and Ring both count as best."""
    from peer_models import configurations

    work, _, name = job.partition(":")
    return name not in (configurations(BY_NAME[work], ranks)[:1] + ["Ring"])


def _run(jobs: list[str], ranks: int, given: argparse.Namespace, deadline: float) -> list[str]:
    """Time jobs in one set of processes; the jobs that are left, fewer than before."""
    lines = _lines(given.out)
    processes = _start(jobs, ranks, given)
    done, since = 0, time.monotonic()
    error = ""
    while not error and any(process.poll() is None for process in processes):
        time.sleep(0.5)
        now, known = time.monotonic(), _lines(given.out) - lines
        if known > done:
            done, since = known, now
        if now - since > given.limit + 40.0 * (done == 0):
            error = f"took more than {given.limit:.0f} s"
        elif now > deadline:
            error = "not run: the time was used up"
    for process in processes:
        _end(process)
    done = _lines(given.out) - lines
    if done < len(jobs):
        codes = sorted({process.returncode for process in processes})
        _write(given.out, jobs[done], ranks, error or f"its processes ended with {codes}")
        done += 1
    return jobs[done:]


def _start(jobs: list[str], ranks: int, given: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/tmp/onnxmesh-peers-inductor")
    threads = max(1, (os.cpu_count() or 1) // ranks)
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
        "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0"),
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(threads, 8)),
        "OMP_NUM_THREADS": str(min(threads, 8)),
    }
    command = [sys.executable, str(HERE / "peer_rank.py"), str(given.out), *jobs, "--runs", str(given.runs)]
    command += ["--tiny"] * given.tiny
    return [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True
        )
        for rank in range(ranks)
    ]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it with the compilers it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _write(path: Path, job: str, ranks: int, error: str) -> None:
    work, _, configuration = job.partition(":")
    line = json.dumps({"work": work, "ranks": ranks, "configuration": configuration, "error": error})
    with path.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
