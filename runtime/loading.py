"""How fast weights were loaded, and how fast the same bytes can be read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.serialize import stored_shards

_CHUNK = 16 << 20


@dataclass(frozen=True)
class LoadReport:
    """What the ranks of this process, or of a session that controls them, loaded.

    Attributes:
        nbytes: bytes of weights, of all ranks together.
        seconds: what the slowest rank took, from opening the files to the last byte in its place.
        plain: bytes a second that the files give when they are only read; 0 if that was not measured.
    """

    nbytes: int
    seconds: float
    plain: float = 0.0

    @classmethod
    def of_ranks(cls, reports: Iterable[tuple[int, float]]) -> Self:
        """From every rank's bytes and seconds, loaded side by side."""
        found = list(reports)
        return cls(sum(nbytes for nbytes, _ in found), max((seconds for _, seconds in found), default=0.0))

    def beside(self, plain: float) -> LoadReport:
        """The same with the speed of a plain read."""
        return replace(self, plain=plain)

    def __str__(self) -> str:
        speed = self.nbytes / max(self.seconds, 1e-9)
        text = f"load: {_size(self.nbytes)} in {self.seconds:.2f} s, {_size(speed)}/s"
        return f"{text}; plain read of the same files {_size(self.plain)}/s" if self.plain else text


def plain_read(folder: str | Path, plan: Plan, coordinates: Sequence[Mapping[str, int]]) -> float:
    """Bytes a second when the shards of the ranks at `coordinates` are read, each rank's in a thread, and dropped.

    Raises:
        PlanError: as `stored_shards`.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(max(1, len(coordinates))) as pool:
        total = sum(pool.map(lambda at: _read(folder, plan, at), coordinates))
    return total / max(time.perf_counter() - start, 1e-9)


def _read(folder: str | Path, plan: Plan, coordinate: Mapping[str, int]) -> int:
    buffer, total = np.empty(_CHUNK, np.uint8).data, 0
    with stored_shards(folder, plan, coordinate) as shards:
        for shard in shards:
            for start in range(0, shard.nbytes, _CHUNK):
                shard.read_into(buffer[: min(_CHUNK, shard.nbytes - start)], start)
            total += shard.nbytes
    return total


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.2f} kB"
