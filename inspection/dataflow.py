"""What a program's instructions hand on, and how long every buffer lives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from onnxmesh.runtime.memory import aligned
from onnxmesh.runtime.plan import Buffer, Program


@dataclass(frozen=True)
class Life:
    """When a buffer of the arena holds something: from the first instruction that writes it to the last reader."""

    buffer: int
    bytes: int
    offset: int
    first: int
    last: int


class Dataflow:
    """Who writes and reads what in a program.

    Attributes:
        sources: for every instruction and each of its inputs, the instructions that made it.
        writers, readers: by buffer with memory of its own, the instructions that write or read any of it.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.writers: dict[int, list[int]] = defaultdict(list)
        self.readers: dict[int, list[int]] = defaultdict(list)
        self._written: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self.sources: list[tuple[tuple[int, ...], ...]] = []
        for at, item in enumerate(program.instructions):
            self.sources.append(tuple(self._made(buffer, item.after) for buffer in item.ins))
            for buffer in item.ins:
                if buffer >= 0:
                    self.readers[self.root(buffer)].append(at)
            for buffer in item.outs:
                root, start, stop = self._span(buffer)
                self.writers[root].append(at)
                self._written[root].append((at, start, stop))

    def root(self, buffer: int) -> int:
        """The buffer whose bytes a view is."""
        while self.program.buffers[buffer].kind == "view":
            buffer = self.program.buffers[buffer].source
        return buffer

    def made(self, buffer: int) -> tuple[int, ...]:
        """The instructions that write any of what a buffer holds."""
        root, start, stop = self._span(buffer)
        return tuple(at for at, first, last in self._written[root] if first < stop and start < last)

    def _made(self, buffer: int, after: Sequence[int]) -> tuple[int, ...]:
        """Those that an instruction waits for: parts of a buffer that lie interleaved only seem to overlap."""
        return tuple(at for at in self.made(buffer) if at in after) if buffer >= 0 else ()

    def _span(self, buffer: int) -> tuple[int, int, int]:
        """(root, first byte, end) of a buffer's elements."""
        item, start = self.program.buffers[buffer], 0
        length = _length(item)
        while item.kind == "view":
            start += item.offset
            buffer, item = item.source, self.program.buffers[item.source]
        return buffer, start, start + max(length, 1)

    def lives(self) -> list[Life]:
        """Of every buffer of the arena. What another stream reads lives until its result is read."""
        program, end = self.program, len(self.program.instructions)
        kept = {self.root(port.buffer) for port in program.outputs}
        joined = self._joins()
        found = []
        for index, buffer in enumerate(program.buffers):
            if buffer.kind != "arena" or not self.writers[index]:
                continue
            users = (*self.writers[index], *self.readers[index])
            last = end - 1 if index in kept else max(*users, *(joined.get(user, 0) for user in users))
            found.append(Life(index, aligned(buffer.nbytes), buffer.offset, self.writers[index][0], last))
        return found

    def _joins(self) -> dict[int, int]:
        """For every instruction beside the first stream, the last one before its results are read."""
        reader: dict[int, int] = {}
        for at, sources in enumerate(self.sources):
            for made in (made for each in sources for made in each):
                reader.setdefault(made, at)
        items = self.program.instructions
        return {at: reader.get(at, at + 1) - 1 for at, item in enumerate(items) if item.stream}


def alive(lives: Sequence[Life], instructions: int) -> list[int]:
    """Bytes that the arena holds at every instruction."""
    changes = [0] * (instructions + 1)
    for life in lives:
        changes[life.first] += life.bytes
        changes[life.last + 1] -= life.bytes
    total, found = 0, []
    for change in changes[:instructions]:
        total += change
        found.append(total)
    return found


def _length(buffer: Buffer) -> int:
    """Bytes from a buffer's first element to the end of its last."""
    if not buffer.strides or not buffer.nbytes:
        return buffer.nbytes
    elements = 1 + sum((size - 1) * stride for size, stride in zip(buffer.shape, buffer.strides))
    count = 1
    for size in buffer.shape:
        count *= size
    return elements * (buffer.nbytes // count)
