"""Ranks that are killed or stopped: do all the others end, with a message, and is the memory of the GPUs free again?

python tests/gpu/faults.py --ranks 2            a table; exit status 1 if a case fails

`controlled`: one process starts the ranks. `apart`: the ranks are processes of their own, as under torchrun. What is
disturbed is rank 1, unless the case says otherwise. While it loads a rank is caught by a pipe in place of its weights.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import numpy as np

from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Shard
from onnxmesh.runtime.plan import Buffer, Collective, Instruction, Launch, Plan, Port, Program, Weight
from onnxmesh.runtime.serialize import save

SURVIVE = 15.0
"""Seconds after which no process may be left."""
START = 180.0
"""Seconds that ranks get to start and run."""
STEPS = 50
"""Collectives of a run: it lasts long enough to be disturbed in its middle."""
FREE = 64
"""MiB of a GPU's memory that may be taken by something else in the meantime."""
_PROGRAM = Path(__file__).with_name("fault_rank.py")
_MEMORY = (
    "import cupy; print([cupy.cuda.Device(i).mem_info[0] >> 20 for i in range(cupy.cuda.runtime.getDeviceCount())])"
)


@dataclass(frozen=True)
class Case:
    """Something that happens to a job.

    Attributes:
        moment: `start-up`, `loading` or `running`.
        victim: the rank that it happens to; -1: the process that controls the ranks.
        stall: the victim is stopped, not killed.
        says: what the output of a survivor must contain, as a regular expression; {device: pattern} where they differ.
    """

    mode: str
    moment: str
    victim: int = 1
    stall: bool = False
    says: str = "rank 1"

    def __str__(self) -> str:
        who = "the controlling process" if self.victim < 0 else f"rank {self.victim}"
        return f"{self.mode}: {who} {'stops' if self.stall else 'is killed'}, {self.moment}"


@dataclass
class Outcome:
    """What a case came to."""

    case: Case
    seconds: float = 0.0
    survivors: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    memory: str = ""
    wrong: list[str] = field(default_factory=list)


APART = (
    Case("apart", "start-up"),
    Case("apart", "loading"),
    Case("apart", "running"),
    Case("apart", "running", victim=0, says="rank 0|rank -1"),
    Case("apart", "running", stall=True, says=r"waited .* (at instruction \d+, AllReduce along tp|for rank 1)"),
)
CONTROLLED = (
    Case("controlled", "start-up"),
    Case("controlled", "loading"),
    Case("controlled", "running"),
    Case("controlled", "running", stall=True, says=r"(instruction \d+, AllReduce along tp.*|no answer from )rank 1"),
    Case("controlled", "running", victim=-1, says=""),
)


def make_plan(folder: Path, ranks: int, size: int) -> None:
    """A plan of many sums over all ranks, with a weight that each rank holds a part of."""
    mesh, shape = Mesh.of(tp=ranks), (size, size)
    weight = Weight("w", "float32", (ranks * size, size), (("tp", Shard.plain(0, ranks * size)),), _source("w"))
    buffers = (
        Buffer("float32", shape, "input", source=0),
        Buffer("float32", shape, "weight", source=0),
        Buffer("float32", shape, "arena", 0),
        Buffer("float32", shape, "arena", 4 * size * size),
    )
    steps: list[Instruction] = [Launch("Add", (0, 1), (2,), node="first")]
    for number in range(STEPS):
        steps.append(Collective("AllReduce", "tp", (2,), (3,), {"reduce": "sum"}, f"sum{number}"))
        steps.append(Launch("Tanh", (3,), (2,), node=f"tanh{number}"))
    inputs, outputs = (Port("x", "float32", shape, (), 0),), (Port("y", "float32", shape, (), 2),)
    program = Program({}, inputs, outputs, buffers, tuple(steps), 8 * size * size)
    save(Plan(mesh, (weight,), (program,)), folder, {"w": np.ones((ranks * size, size), np.float32)}.__getitem__)


def _source(name: str) -> dict[str, str]:
    return {"op": "source", "name": name}


class Job:
    """The processes of a case, and what they say."""

    def __init__(self, case: Case, plan: Path, folder: Path, ranks: int, device: str, timeout: float) -> None:
        self.case, self._folder = case, folder
        command = [sys.executable, str(_PROGRAM), str(plan), device, str(timeout)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(ranks if case.mode == "apart" else 1):
            environment = dict(os.environ)
            if case.mode == "apart":
                place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
                environment |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            with self._log(rank).open("wb") as log:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def ranks(self) -> dict[int, int]:
        """The processes of the ranks that there are, by rank."""
        if self.case.mode == "apart":
            return {rank: process.pid for rank, process in enumerate(self.processes)}
        return {rank: pid for pid in _children(self.processes[0].pid) if (rank := _rank_of(pid)) >= 0}

    def victim(self) -> int:
        """The process that something is to happen to."""
        if self.case.victim < 0:
            return self.processes[0].pid
        wait_for(lambda: self.case.victim in self.ranks(), START, "the rank's process")
        return self.ranks()[self.case.victim]

    def says(self, text: str) -> bool:
        """Whether every process that was started here has said it."""
        return all(text in self._log(rank).read_text(errors="replace") for rank in range(len(self.processes)))

    def lines(self) -> list[str]:
        """The last line of what each process said."""
        found = []
        for rank in range(len(self.processes)):
            lines = [line for line in self._log(rank).read_text(errors="replace").splitlines() if line != "running"]
            found.append(f"{rank}: {lines[-1] if lines else '-'}")
        return found

    def _log(self, rank: int) -> Path:
        return self._folder / f"{rank}.log"


def run_case(case: Case, plan: Path, ranks: int, device: str, timeout: float) -> Outcome:
    """Start a job, disturb it, and see what is left of it."""
    outcome = Outcome(case)
    with TemporaryDirectory(prefix="onnxmesh-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        own = Path(copytree(plan, folder / "a.plan"))
        pipe = own / "weights" / f"tp{case.victim}.safetensors"
        if case.moment == "loading":
            pipe.unlink()
            os.mkfifo(pipe)
        job = Job(case, own, folder, ranks, device, timeout)
        pids: set[int] = {process.pid for process in job.processes}
        try:
            victim = job.victim()
            stack.callback(os.close, _await_moment(job, pipe))
            pids |= set(job.ranks().values())
            os.kill(victim, signal.SIGSTOP if case.stall else signal.SIGKILL)
            _await_end(job, pids, victim, outcome)
        except TimeoutError as error:
            outcome.wrong.append(str(error))
        finally:
            outcome.said = job.lines()
            _end(job, pids)
    text = "\n".join(outcome.said)
    if not re.search(case.says, text):
        outcome.wrong.append(f"nobody said {case.says!r}")
    if "Traceback" in text:
        outcome.wrong.append("a traceback")
    return outcome


def _await_moment(job: Job, pipe: Path) -> int:
    """Wait until it is time. An open file, to be closed at the end: with it a rank that loads waits for its weights."""
    opened: list[int] = []
    if job.case.moment == "running":
        wait_for(lambda: job.says("running"), START, "a run")
    elif job.case.moment == "loading":
        wait_for(lambda: _is_read(pipe, opened), START, "a rank that loads")
    time.sleep(0.3)
    return opened[0] if opened else os.open(os.devnull, os.O_RDONLY)


def _await_end(job: Job, pids: set[int], victim: int, outcome: Outcome) -> None:
    """Wait for the end of all, and note how long it took. What is only stopped goes on once the others have ended."""
    start = time.monotonic()
    apart = job.case.stall and job.case.mode == "apart"
    others = pids - {victim} if apart else pids
    end = start + SURVIVE
    while (left := _alive(others, job)) and time.monotonic() < end:
        time.sleep(0.1)
    outcome.seconds = time.monotonic() - start
    outcome.survivors = sorted(left)
    if apart:
        os.kill(victim, signal.SIGCONT)
        end = time.monotonic() + SURVIVE
        while _alive({victim}, job) and time.monotonic() < end:
            time.sleep(0.1)
        outcome.survivors += sorted(_alive({victim}, job))
    if outcome.survivors:
        outcome.wrong.append(f"processes are left: {outcome.survivors}")


def _is_read(pipe: Path, opened: list[int]) -> bool:
    """Whether a process has the pipe open for reading; it is then open for writing, too."""
    with suppress(OSError):
        opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    return bool(opened)


def _alive(pids: set[int], job: Job) -> set[int]:
    """The processes that have not ended. A child of ours that nobody has waited for has."""
    for process in job.processes:
        process.poll()
    return {pid for pid in pids if _state(pid) not in ("", "Z")}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _rank_of(pid: int) -> int:
    """The rank that a process is, by its environment; -1 if it is none."""
    with suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [int(entry[5:]) for entry in variables if entry.startswith(b"RANK=")]
        return ranks[0] if ranks else -1
    return -1


def _end(job: Job, pids: set[int]) -> None:
    """Leave nothing behind."""
    for pid in _alive(pids, job):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    for process in job.processes:
        process.wait()


def wait_for(ready: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until `ready()`. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.05)


def free_memory(device: str) -> list[int]:
    """Free MiB of every GPU."""
    if device == "cpu":
        return []
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, timeout=120, check=True)
    return [int(number) for number in re.findall(r"\d+", done.stdout)]


def run_all(cases: Sequence[Case], ranks: int, device: str, timeout: float) -> list[Outcome]:
    """Every case, one after another, with the GPUs' memory in between."""
    outcomes = []
    with TemporaryDirectory(prefix="onnxmesh-") as temporary:
        plan = Path(temporary) / "faults.plan"
        make_plan(plan, ranks, 8 if device == "cpu" else 1024)
        before = free_memory(device)
        for case in cases:
            outcome = run_case(case, plan, ranks, device, timeout)
            after = free_memory(device)
            outcome.memory = f"{min(before, default=0)} / {min(after, default=0)}"
            if any(a < b - FREE for a, b in zip(after, before)):
                outcome.wrong.append(f"memory is not free: {before} MiB before, {after} after")
            outcomes.append(outcome)
            print(_row(outcome), flush=True)
    return outcomes


def _row(outcome: Outcome) -> str:
    verdict = "ok" if not outcome.wrong else "WRONG: " + "; ".join(outcome.wrong)
    lines = "\n".join(f"      {line}" for line in outcome.said)
    return (
        f"{outcome.case}\n   {outcome.seconds:5.1f} s, {len(outcome.survivors)} left, "
        f"MiB free before / after {outcome.memory}: {verdict}\n{lines}"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--timeout", type=float, default=8.0)
    given = parser.parse_args()
    outcomes = run_all(APART + CONTROLLED, given.ranks, given.device, given.timeout)
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    print(f"{len(outcomes)} cases, {wrong} wrong; slowest end {max(o.seconds for o in outcomes):.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
