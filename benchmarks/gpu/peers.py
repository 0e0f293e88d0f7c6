"""Time the peers on this host's GPUs.

python benchmarks/gpu/peers.py OUT.jsonl [--only flux-4608,llama] [--ranks 1 4] [--budget 500]

Needs torch; diffusers for FLUX, transformers for Llama. The works that matter most are timed first, and a line is
written for each configuration as soon as it is known. A configuration that takes too long is ended and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
import time
from pathlib import Path
from tempfile import gettempdir

from processes import Clock, append, end, lines, start
from shapes import BY_NAME, selected

HERE = Path(__file__).parent
LIBRARY = {"flux": "diffusers", "llama": "transformers"}
START = 40.0
"""Seconds that ranks may take until their first configuration."""


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
    clock = Clock(given.budget)
    found = given.ranks or [1, 4, 2, 8]
    for ranks in [n for n in found if n <= (n if given.tiny else _gpus())]:
        jobs = _jobs(given, ranks)
        while jobs and clock.left:
            jobs = _run(jobs, ranks, given, clock)
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


def _run(jobs: list[str], ranks: int, given: argparse.Namespace, clock: Clock) -> list[str]:
    """Time jobs in one set of processes; the jobs that are left, fewer than before."""
    before = _known(given.out)
    processes = [
        start(_command(jobs, given), _environment(ranks, rank, port)) for port in [_port()] for rank in range(ranks)
    ]
    done, since, error = 0, time.monotonic(), ""
    while not error and any(process.poll() is None for process in processes):
        time.sleep(0.5)
        known = _known(given.out) - before
        if known > done:
            done, since = known, time.monotonic()
        if time.monotonic() - since > given.limit + (START if done == 0 else 0.0):
            error = f"took more than {given.limit:.0f} s"
        elif not clock.left:
            error = "not run: the time was used up"
    for process in processes:
        end(process)
    done = _known(given.out) - before
    if done < len(jobs):
        codes = sorted({process.returncode for process in processes})
        _write(given.out, jobs[done], ranks, error or f"its processes ended with {codes}")
        done += 1
    return jobs[done:]


def _command(jobs: list[str], given: argparse.Namespace) -> list[str]:
    command = [sys.executable, str(HERE / "peer_rank.py"), str(given.out), *jobs, "--runs", str(given.runs)]
    return command + ["--tiny"] * given.tiny


def _environment(ranks: int, rank: int, port: int) -> dict[str, str]:
    threads = str(min(8, max(1, (os.cpu_count() or 1) // ranks)))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",  # one host
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(Path(gettempdir(), "peers-inductor"))),
        "TORCHINDUCTOR_COMPILE_THREADS": threads,
        "OMP_NUM_THREADS": threads,
    }


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _known(path: Path) -> int:
    return sum(1 for _ in lines(path))


def _write(path: Path, job: str, ranks: int, error: str) -> None:
    work, _, configuration = job.partition(":")
    append(path, {"work": work, "ranks": ranks, "configuration": configuration, "error": error})


if __name__ == "__main__":
    main()
