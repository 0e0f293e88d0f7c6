"""Programs that are given so long and no longer, and lines of JSON in a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def start(command: Sequence[str], env: Mapping[str, str] | None = None, **given: Any) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own. NVLink multicast stays as the host has it, off if unsaid."""
    multicast = {"NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0")}
    return subprocess.Popen(command, env={**os.environ, **multicast, **(env or {})}, start_new_session=True, **given)


def end(process: subprocess.Popen[bytes]) -> None:
    """End it, with what it started in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: Sequence[str], seconds: float, log: Path) -> str:
    """Run a program to its end; why it failed, or nothing. What it prints goes to `log`."""
    with log.open("ab") as file:
        process = start(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # lets it end its ranks
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            return f"took more than {seconds:.0f} s"
        finally:
            end(process)
    return "" if process.returncode == 0 else f"exit code {process.returncode}: {_complaint(log)}"


def _complaint(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return " ".join((errors or lines or ["it printed nothing"])[-1].split())[:400]


def append(path: Path, line: Json) -> None:
    """Add a line to a file, and show it."""
    text = json.dumps(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text + "\n")
    print(text if len(text) < 600 else text[:597] + "...", flush=True)


def lines(path: Path) -> Iterator[Json]:
    """The lines of a file, none if there is no file."""
    if path.exists():
        for text in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                yield json.loads(text)


class Clock:
    """How much is left of so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())
