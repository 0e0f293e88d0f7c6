"""Where buffers lie: no two live ones overlap, in any order that the dependencies allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from onnxmesh.compiler.memory import Layout, Lifetime, plan
from onnxmesh.runtime.memory import ALIGNMENT, aligned


@dataclass(frozen=True)
class Random:
    """A random program: of every instruction what it reads; it writes the buffer of its own number."""

    reads: list[list[int]]
    lifetimes: dict[int, Lifetime]


def random_program(rng: np.random.Generator, count: int = 60) -> Random:
    """Every instruction reads up to three earlier results; the last few stay to the end."""
    reads = [
        sorted({int(rng.integers(max(0, i - 12), i)) for _ in range(rng.integers(0, 4)) if i}) for i in range(count)
    ]
    lifetimes = {}
    for i in range(count):
        users = (i, *(j for j in range(count) if i in reads[j]))
        size = int(rng.choice([0, 4, 256, 1000, 4096, 10_000]))
        lifetimes[i] = Lifetime(size, (i,), count if i >= count - 3 else max(users), users)
    return Random(reads, lifetimes)


def overlapping(layout: Layout, lifetimes: Mapping[int, Lifetime]) -> list[tuple[int, int]]:
    """Pairs of buffers that share bytes, the one written first before the other."""
    ends = {b: layout.offsets[b] + lifetimes[b].size for b in lifetimes}
    order = sorted(lifetimes, key=lambda b: lifetimes[b].first)
    return [
        (a, b)
        for i, a in enumerate(order)
        for b in order[i + 1 :]
        if layout.offsets[a] < ends[b] and layout.offsets[b] < ends[a]
    ]


@pytest.mark.parametrize("seed", range(20))
def test_live_buffers_do_not_overlap(seed: int) -> None:
    lifetimes = random_program(np.random.default_rng(seed)).lifetimes
    layout = plan(lifetimes)
    for a, b in overlapping(layout, lifetimes):
        assert lifetimes[a].last < lifetimes[b].first
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets.values())
    assert all(layout.offsets[b] + life.size <= layout.size for b, life in lifetimes.items())


@pytest.mark.parametrize("seed", range(20))
def test_whoever_shares_bytes_is_ordered_by_dependencies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = random_program(rng)
    layout = plan(program.lifetimes)
    after = [set(reads) | layout.waits.get(i, set()) for i, reads in enumerate(program.reads)]
    shared = overlapping(layout, program.lifetimes)
    assert shared
    for _ in range(20):
        at = {item: position for position, item in enumerate(random_order(after, rng))}
        for a, b in shared:
            assert all(at[user] < at[b] for user in program.lifetimes[a].users)


def random_order(after: list[set[int]], rng: np.random.Generator) -> list[int]:
    """A topological order, any of them."""
    left, order = set(range(len(after))), []
    while left:
        ready = sorted(i for i in left if not after[i] & left)
        order.append(int(rng.choice(ready)))
        left.remove(order[-1])
    return order


def test_the_arena_is_hardly_larger_than_what_is_live() -> None:
    for seed in range(10):
        lifetimes = random_program(np.random.default_rng(seed)).lifetimes
        peak = max(
            sum(aligned(life.size) for life in lifetimes.values() if life.first <= at <= life.last)
            for at in range(len(lifetimes) + 1)
        )
        assert peak <= plan(lifetimes).size <= 1.25 * peak


def test_no_buffers_need_no_memory() -> None:
    assert plan({}) == Layout({}, 0, {})
