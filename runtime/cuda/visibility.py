"""Which keys the queries of an attention see, in the few forms that need no mask in memory.

Positions and constant masks are numbers that are known when a program is loaded. Where every query sees the first so
many keys, the queries fall into a few runs: of one with no keys nothing has to be computed, of one with a fixed number
of keys the others are left out, and one whose number grows by one from row to row is causal. No GPU is needed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Run:
    """Queries [start, stop) that see the first `keys` keys; where causal, the last of them does, and each of the
    others one key less than the next. The first of a causal run sees a key at least."""

    start: int
    stop: int
    keys: int
    causal: bool = False

    @property
    def rows(self) -> int:
        """How many queries these are."""
        return self.stop - self.start


def seen_by_position(q_pos: np.ndarray, k_pos: np.ndarray) -> np.ndarray | None:
    """For every query how many keys it sees, if these are the first ones; None if they are not.

    q_pos int [s], k_pos int [t]; key j is visible to query i where k_pos[j] <= q_pos[i].
    """
    t = len(k_pos)
    if t == 0 or len(q_pos) == 0:
        return np.zeros(len(q_pos), np.int64)
    if k_pos.max() <= q_pos.min():
        return np.full(len(q_pos), t, np.int64)
    if k_pos.min() > q_pos.max():
        return np.zeros(len(q_pos), np.int64)
    if (np.diff(k_pos) < 0).any():
        return None
    return np.searchsorted(k_pos, q_pos, side="right").astype(np.int64)


def seen_by_mask(mask: np.ndarray) -> np.ndarray | None:
    """The same for a mask, bool [s, t]: true where a key is visible."""
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        return None
    return mask.sum(axis=1, dtype=np.int64)


def runs(seen: np.ndarray, most: int = 4) -> tuple[Run, ...] | None:
    """The runs of queries that see `seen` [s] keys each; None if there are more than `most`."""
    found = []
    for run in _runs(seen):
        found.append(run)
        if len(found) > most:
            return None
    return tuple(found)


def _runs(seen: np.ndarray) -> Iterator[Run]:
    steps, start = np.diff(seen), 0
    while start < len(seen):
        step = int(steps[start]) if start < len(steps) else 0
        causal = step == 1 and seen[start] > 0
        if step and not causal:
            stop = start + 1
        else:
            others = np.flatnonzero(steps[start:] != step)
            stop = start + 1 + (int(others[0]) if len(others) else len(steps) - start)
        yield Run(start, stop, int(seen[stop - 1]), causal)
        start = stop
