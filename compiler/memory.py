"""Where the buffers of a program lie in its arena.

Every buffer has its place from the first instruction that writes any of it to the last one that reads it. A few ways to
fill the arena are tried, in the order of time and the largest or longest-lived first; the smallest arena is taken.
Whoever takes over a place waits for the last users of what was there, so backends that overlap instructions stay
correct: their order is in the instructions' dependencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxmesh.runtime.memory import aligned


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `size` bytes: who writes any of it, who uses it last, and all who use it (by instruction)."""

    size: int
    writers: tuple[int, ...]
    last: int
    users: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first instruction that writes."""
        return min(self.writers)


@dataclass(frozen=True)
class Layout:
    """Offsets by buffer, the arena's size, its peak use, and what each instruction must also wait for."""

    offsets: Mapping[int, int]
    size: int
    waits: Mapping[int, frozenset[int]]


def plan(lifetimes: Mapping[int, Lifetime]) -> Layout:
    """Offsets for all buffers."""
    in_time = sorted(lifetimes, key=lambda b: (lifetimes[b].first, b))
    sizes = {b: aligned(life.size) for b, life in lifetimes.items()}
    spans = {b: life.last - life.first + 1 for b, life in lifetimes.items()}
    by_size = sorted(in_time, key=lambda b: -sizes[b])
    by_area = sorted(in_time, key=lambda b: -sizes[b] * spans[b])
    by_span = sorted(in_time, key=lambda b: (-spans[b], -sizes[b]))
    orders = (in_time, by_size, by_area, by_span)
    size, offsets = min((_fill(lifetimes, order) for order in orders), key=lambda filled: filled[0])
    return Layout(offsets, size, _waits(lifetimes, in_time, offsets))


def _fill(lifetimes: Mapping[int, Lifetime], order: Sequence[int]) -> tuple[int, dict[int, int]]:
    """First fit in the given order: every buffer at the lowest place that is free while it lives."""
    spans = np.array([(lifetimes[b].first, lifetimes[b].last) for b in order], np.int64).reshape(-1, 2)
    places = np.zeros_like(spans)
    for i, buffer in enumerate(order):
        first, last = spans[i]
        beside = places[:i][(spans[:i, 0] <= last) & (spans[:i, 1] >= first)]
        size = aligned(lifetimes[buffer].size)
        offset = _first_gap(sorted(map(tuple, beside.tolist())), size)
        places[i] = offset, offset + size
    return int(places[:, 1].max(initial=0)), dict(zip(order, places[:, 0].tolist()))


def _first_gap(taken: Sequence[tuple[int, ...]], size: int) -> int:
    offset = 0
    for start, stop in taken:
        if start - offset >= size:
            return offset
        offset = max(offset, stop)
    return offset


def _waits(
    lifetimes: Mapping[int, Lifetime], in_time: Sequence[int], offsets: Mapping[int, int]
) -> dict[int, frozenset[int]]:
    """What an instruction must wait for: the users of the places that its results take over."""
    waits: dict[int, set[int]] = {}
    past: list[tuple[int, int, int]] = []
    for buffer in in_time:
        life, offset = lifetimes[buffer], offsets[buffer]
        past, taken = _take_over(past, offset, offset + aligned(life.size))
        for writer in life.writers:
            waits.setdefault(writer, set()).update(*(lifetimes[old].users for old in taken))
        past.append((offset, offset + aligned(life.size), buffer))
    return {at: frozenset(users - {at}) for at, users in waits.items()}


def _take_over(
    past: list[tuple[int, int, int]], offset: int, stop: int
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Split former places into those that [offset, stop) leaves alone and those that it covers, wholly or in part.

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
