"""Where the buffers of a program lie in its arena.

First fit by liveness: a buffer takes the lowest place that is free from the instruction that writes it to the last one
that reads it. Whoever takes over a place waits for the last users of what was there, so backends that overlap
instructions stay correct: their order is in the instructions' dependencies.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes; what vectorised loads and collectives like best."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `size` bytes, written by instruction `first` and last used by `last`; `users` are all of them."""

    size: int
    first: int
    last: int
    users: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Offsets by buffer, the arena's size, its peak use, and what each instruction must also wait for."""

    offsets: Mapping[int, int]
    size: int
    waits: Mapping[int, frozenset[int]]


def plan(lifetimes: Mapping[int, Lifetime]) -> Layout:
    """Offsets for all buffers."""
    offsets: dict[int, int] = {}
    waits: dict[int, set[int]] = {}
    live: list[tuple[int, int, int]] = []  # (offset, end, buffer), sorted
    past: list[tuple[int, int, int]] = []  # places whose buffers are dead, latest last
    end = 0
    for buffer, life in sorted(lifetimes.items(), key=lambda item: (item[1].first, item[0])):
        dead = [entry for entry in live if lifetimes[entry[2]].last < life.first]
        live = [entry for entry in live if lifetimes[entry[2]].last >= life.first]
        past += dead
        offset = _first_fit(live, _aligned(life.size))
        stop = offset + _aligned(life.size)
        offsets[buffer] = offset
        insort(live, (offset, stop, buffer))
        end = max(end, stop)
        past, taken = _take_over(past, offset, stop)
        for old in taken:
            waits.setdefault(life.first, set()).update(lifetimes[old].users)
    return Layout(offsets, end, {at: frozenset(users - {at}) for at, users in waits.items()})


def _aligned(size: int) -> int:
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


def _first_fit(live: Sequence[tuple[int, int, int]], size: int) -> int:
    offset = 0
    for start, stop, _ in live:
        if start - offset >= size:
            return offset
        offset = max(offset, stop)
    return offset


def _take_over(
    past: list[tuple[int, int, int]], offset: int, stop: int
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Split dead places into those that [offset, stop) leaves alone and those that it covers, wholly or in part.

    A place that is covered in part stays: others may take over the rest of it.
    """
    kept, taken = [], []
    for entry in past:
        if entry[0] < stop and offset < entry[1]:
            taken.append(entry[2])
            if offset <= entry[0] and entry[1] <= stop:
                continue
        kept.append(entry)
    return kept, taken
