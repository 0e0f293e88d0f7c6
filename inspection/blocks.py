"""The blocks that a program repeats: found by the modules of its instructions, else by equal sequences of them.

A module path such as `layers.3.mlp` says that an instruction belongs to block 3 of `layers`. What has no module is put
where its inputs come from. Blocks one after another with the same instructions are one *fold*, shown once.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

LEAST = 3
"""Instructions of a block that is worth folding, on average."""

MOST_FOLDS = 8
"""More folds of one container than these are put into one, alike or not."""

_NUMBERED = re.compile(r"^(.*[^\d])[_.]?(\d+)$|^(\d+)$")

Key = tuple[str, int]
"""(container, number): `layers.3` is ("layers", 3)."""


@dataclass(frozen=True)
class Block:
    """Some instructions that belong together, in the order of the program, and the folds among them."""

    name: str
    instructions: tuple[int, ...]
    folds: tuple[Fold, ...] = ()


@dataclass(frozen=True)
class Fold:
    """Blocks that repeat; `alike` says whether all of them do the same."""

    name: str
    blocks: tuple[Block, ...]
    alike: bool = True


@dataclass(frozen=True)
class Steps:
    """What is known of a program's instructions, by their numbers.

    Attributes:
        modules: module paths, or "".
        signatures: equal for instructions that do the same.
        sources: the instructions that each reads from.
    """

    modules: Sequence[str]
    signatures: Sequence[Hashable]
    sources: Sequence[Sequence[int]]


def folds(steps: Steps) -> tuple[Fold, ...]:
    """The folds of a whole program, the outermost ones."""
    everything = range(len(steps.modules))
    return _by_module(steps, everything, 0) or _by_repetition(steps, everything)


# --- by module ----------------------------------------------------------------------------------------------


def numbered(path: str, level: int) -> Key | None:
    """The block that a module path names at a level: of `a.0.b.1.c` (a, 0) at 0 and (a.0.b, 1) at 1."""
    parts = path.split(".")
    for at, part in enumerate(parts):
        match = _NUMBERED.match(part)
        if match is None or (match[3] is not None and at == 0):
            continue
        if level:
            level -= 1
            continue
        stem = [*parts[:at], match[1].rstrip("_")] if match[3] is None else parts[:at]
        return ".".join(stem), int(match[2] or match[3])
    return None


def _by_module(steps: Steps, within: Sequence[int], level: int) -> tuple[Fold, ...]:
    said = {at: key for at in within if (key := numbered(steps.modules[at], level)) is not None}
    names = defaultdict[str, set[int]](set)
    for container, number in said.values():
        names[container].add(number)
    counts = Counter(container for container, _ in said.values())
    repeated = {name for name, found in names.items() if len(found) > 1 and counts[name] >= len(found)}
    said = {at: key for at, key in said.items() if key[0] in repeated}
    if not said:
        return ()
    members = _members(steps, within, said)
    result: list[Fold] = []
    for container in dict.fromkeys(container for container, _ in members):
        found = {number: own for (name, number), own in members.items() if name == container}
        if sum(map(len, found.values())) >= LEAST * len(found):
            result += [fold for fold in _runs(steps, container, found, level) if not level or len(fold.blocks) > 1]
    return tuple(result)


def _members(steps: Steps, within: Sequence[int], said: Mapping[int, Key]) -> dict[Key, tuple[int, ...]]:
    """The instructions of every block, in the order of blocks: those that name it, and those between them."""
    first: dict[str, int] = {}
    for at in within:
        if at in said:
            first.setdefault(said[at][0], at)
    order = {
        key: place for place, key in enumerate(sorted(set(said.values()), key=lambda key: (first[key[0]], key[1])))
    }
    found = dict(said)
    inside = set(within)
    for at in within:
        if at not in found and not steps.modules[at]:
            before = [found[source] for source in steps.sources[at] if source in found and source in inside]
            if before:
                found[at] = max(before, key=order.__getitem__)
    found |= _helpers(steps, within, found)
    members = defaultdict[Key, list[int]](list)
    for at in sorted(found):
        members[found[at]].append(at)
    return {key: tuple(members[key]) for key in order}


def _helpers(steps: Steps, within: Sequence[int], found: Mapping[int, Key]) -> dict[int, Key]:
    """What one block alone reads, and has no module. Before a first block that is what leads to all of them.

    So what the first block reads belongs to it only where other blocks have the same.
    """
    readers = defaultdict[int, list[int]](list)
    for at in within:
        for source in steps.sources[at]:
            readers[source].append(at)
    helpers: dict[int, Key] = {}
    for at in reversed(within):
        users = {found.get(reader, helpers.get(reader)) for reader in readers[at]}
        if at not in found and not steps.modules[at] and len(users) == 1 and None not in users:
            helpers[at] = next(key for key in users if key is not None)
    first: dict[str, int] = {}
    for container, number in found.values():
        first[container] = min(number, first.get(container, number))
    later = {(steps.signatures[at], key[0]) for at, key in helpers.items() if key[1] != first[key[0]]}
    return {
        at: key for at, key in helpers.items() if key[1] != first[key[0]] or (steps.signatures[at], key[0]) in later
    }


def _runs(steps: Steps, container: str, found: Mapping[int, tuple[int, ...]], level: int) -> list[Fold]:
    """Blocks one after another with the same instructions."""
    runs: list[list[int]] = []
    last: object = None
    for number in sorted(found):
        kind = sorted(Counter(steps.signatures[at] for at in found[number]).items(), key=repr)
        if not runs or kind != last:
            runs.append([])
        runs[-1].append(number)
        last = kind
    alike = len(runs) <= MOST_FOLDS
    return [_fold(steps, container, run, found, level, alike) for run in (runs if alike else [sorted(found)])]


def _fold(
    steps: Steps, container: str, run: Sequence[int], found: Mapping[int, tuple[int, ...]], level: int, alike: bool
) -> Fold:
    blocks = [
        Block(f"{container}.{number}", found[number], _by_module(steps, found[number], level + 1)) for number in run
    ]
    return Fold(container, tuple(blocks), alike)


# --- by repetition ------------------------------------------------------------------------------------------


def _by_repetition(steps: Steps, within: Sequence[int]) -> tuple[Fold, ...]:
    """The sequence of instructions whose repetition, one after another, covers the most."""
    number = {signature: i for i, signature in enumerate(dict.fromkeys(steps.signatures))}
    kinds = [number[steps.signatures[at]] for at in within]
    start, length, times = _longest(kinds)
    if times < 2 or length < LEAST:
        return ()
    blocks = [
        Block(f"block.{i}", tuple(within[start + i * length : start + (i + 1) * length])) for i in range(times)
    ]  # fmt: skip
    return (Fold("block", tuple(blocks)),)


def _longest(kinds: Sequence[int]) -> tuple[int, int, int]:
    """(start, length, times) of the repetition that covers the most; of equals the one of the shortest sequence."""
    best, covered = (0, 0, 0), 0
    for length in range(LEAST, len(kinds) // 2 + 1):
        run = 0
        for at in range(len(kinds) - length):
            run = run + 1 if kinds[at] == kinds[at + length] else 0
            times = run // length + 1
            if times > 1 and times * length > covered:
                best, covered = (at + 1 - run, length, times), times * length
    return best
