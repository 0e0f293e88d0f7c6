"""Which of several ways to compute the same is the fastest: each is timed once, and the choice is kept on disk.

Choices are kept per GPU model and library version in `ONNXMESH_CACHE`, by default `~/.cache/onnxmesh`. Processes that
tune the same at once wait for the first, so that the ranks of a host choose alike. ONNXMESH_TUNE=0 takes the first
candidate and times nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from onnxmesh.runtime.cuda.device import import_cupy

_FORMAT = 1
_PATIENCE = 10.0
"""Seconds to wait for another process that tunes."""
_NEAR = 1.3
"""Candidates within this factor of the best are timed again."""
_BUDGET = 15.0
"""Milliseconds of a GPU for timing again."""
_REPEATS = 9


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute something.

    Attributes:
        name: what the cache keeps of it.
        launch: enqueues it, given the address of its workspace and a stream.
        workspace: bytes.
    """

    name: str
    launch: Callable[[int, int], None]
    workspace: int = 0


class Choices:
    """The choices kept in a file, by problem. What cannot be read counts as empty, what cannot be written is let be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        self._stamp: tuple[int, int] | None = None

    def get(self, problem: str) -> str | None:
        """The name of what was chosen, by this process or another."""
        self._refresh()
        return self._known.get(problem)

    def put(self, problem: str, name: str) -> None:
        """Keep a choice; call it while `alone`."""
        self._refresh()
        self._known[problem] = name
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            with os.fdopen(handle, "w") as file:
                json.dump({"format": _FORMAT, "choices": self._known}, file, indent=0, sort_keys=True)
            os.replace(beside, self._path)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process is; after ten seconds of waiting in any case."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, ImportError):
                import fcntl

                self._path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(f"{self._path}.lock", "a"))
                end = time.monotonic() + _PATIENCE
                while not _locked(file.fileno(), fcntl) and time.monotonic() < end:
                    time.sleep(0.002)
            yield

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp != self._stamp:
                self._known |= _checked(json.loads(self._path.read_text()))
                self._stamp = stamp
        except (OSError, ValueError):
            pass


def choose(
    problem: str, candidates: Callable[[], Iterable[Candidate]], revive: Callable[[str], Candidate | None]
) -> Candidate | None:
    """The fastest candidate for a problem on the current device; None if there is none.

    Args:
        problem: names all that the choice depends on besides the GPU and the library.
        candidates: makes them, the most promising first. They may write to their results' memory.
        revive: the candidate of a name that was chosen before, or None if there is none of that name any more.
    """
    if os.environ.get("ONNXMESH_TUNE") == "0":
        return next(iter(candidates()), None)
    choices = _choices(import_cupy().cuda.runtime.getDevice())
    known = _known(choices, problem, revive)
    if known is not None:
        return known
    with choices.alone():
        known = _known(choices, problem, revive)
        if known is not None:
            return known
        best = fastest(list(candidates()))
        if best is not None:
            choices.put(problem, best.name)
    return best


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one that takes the least time on the current stream, in a cold cache; those that fail are left out."""
    if len(candidates) < 2:
        return next(iter(candidates), None)
    times = timed(candidates)
    best = min(times.values(), default=0.0)
    close = [i for i, duration in times.items() if duration <= _NEAR * best]
    repeats = min(_REPEATS, int(_BUDGET / max(1e-3, sum(times[i] for i in close))))
    if len(close) > 1 and repeats:
        rounds = [timed([candidates[i] for i in close], warm=False) for _ in range(repeats)]
        times = {i: statistics.median(one[at] for one in rounds if at in one) for at, i in enumerate(close)}
    return candidates[min(times, key=times.__getitem__)] if times else None


def timed(candidates: Sequence[Candidate], *, warm: bool = True) -> dict[int, float]:
    """Milliseconds of every candidate that runs, by its place. `warm`: it runs once before, which loads its kernels."""
    cupy = import_cupy()
    stream = cupy.cuda.get_current_stream()
    workspace = cupy.empty(max([candidate.workspace for candidate in candidates] + [256]), "u1")
    flush, events = _flush(cupy), {}
    for i, candidate in enumerate(candidates):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        try:
            if warm:
                candidate.launch(workspace.data.ptr, stream.ptr)
            flush()
            start.record(stream)
            candidate.launch(workspace.data.ptr, stream.ptr)
            end.record(stream)
        except Exception:  # a library says late what it cannot do
            continue
        events[i] = (start, end)
    stream.synchronize()
    return {i: float(cupy.cuda.get_elapsed_time(*pair)) for i, pair in events.items()}


def folder() -> Path:
    """Where what is tuned to a GPU is kept."""
    given = os.environ.get("ONNXMESH_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "onnxmesh"


def _known(choices: Choices, problem: str, revive: Callable[[str], Candidate | None]) -> Candidate | None:
    name = choices.get(problem)
    return revive(name) if name is not None else None


@cache
def _choices(device: int) -> Choices:
    from onnxmesh.runtime.cuda import cublaslt

    properties = import_cupy().cuda.runtime.getDeviceProperties(device)
    name = re.sub(r"\W+", "-", properties["name"].decode()).strip("-").lower()
    capability = f"{properties['major']}.{properties['minor']}"
    return Choices(folder() / f"gemm-{name}-{capability}-cublaslt-{cublaslt.version()}.json")


def _flush(cupy: Any) -> Callable[[], None]:
    """Reads so much that nothing else is left in the L2 cache; that also lets the host run ahead."""
    size = 2 * int(cupy.cuda.Device().attributes["L2CacheSize"])
    memory, sink = cupy.zeros(max(size, 1 << 20) // 4, cupy.float32), cupy.zeros((), cupy.float32)

    def flush() -> None:
        memory.sum(out=sink)

    return flush


def _locked(file: int, fcntl: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _checked(content: Any) -> dict[str, str]:
    """The choices in a file's content. Raises ValueError if it is not what this version writes."""
    if (
        not isinstance(content, dict)
        or content.get("format") != _FORMAT
        or not isinstance(content.get("choices"), dict)
    ):
        raise ValueError("not a file of choices")
    return {key: name for key, name in content["choices"].items() if isinstance(name, str)}
