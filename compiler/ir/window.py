"""Windows: where the elements of a tensor lie in the memory of another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxmesh.compiler.ir.rule import Shape


def row_major(shape: Sequence[int]) -> Shape:
    """The strides of a tensor whose elements lie one after the other."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Window:
    """`shape` elements at `offset + sum(index * stride)`, all counted in elements of a row-major tensor.

    No stride is negative; a stride of 0 repeats an element.
    """

    shape: Shape
    strides: Shape
    offset: int = 0

    @classmethod
    def whole(cls, shape: Shape) -> Window:
        """All of a row-major tensor."""
        return cls(shape, row_major(shape))

    @property
    def is_row_major(self) -> bool:
        """Whether the elements lie one after the other."""
        pairs = zip(self.shape, self.strides, row_major(self.shape))
        return 0 in self.shape or all(size == 1 or ours == dense for size, ours, dense in pairs)

    def lies_as(self, other: Window) -> bool:
        """Whether both are the same elements in the same shape; strides of dims of one entry do not count."""
        pairs = zip(self.shape, self.strides, other.strides)
        same = all(size == 1 or ours == theirs for size, ours, theirs in pairs)
        return self.shape == other.shape and self.offset == other.offset and same

    @property
    def inner(self) -> int:
        """The stride of the last dim that has more than one entry; 1 without one."""
        return next((stride for size, stride in reversed(tuple(zip(self.shape, self.strides))) if size != 1), 1)

    def runs(self) -> list[tuple[int, int]]:
        """(size, stride) of the fewest dims that hold the same elements in the same order; the innermost first."""
        found: list[tuple[int, int]] = []
        for size, stride in reversed(tuple(zip(self.shape, self.strides))):
            if size == 1:
                continue
            if found and stride == found[-1][0] * found[-1][1]:
                found[-1] = found[-1][0] * size, found[-1][1]
            else:
                found.append((size, stride))
        return found

    def dims(self, start: int, stop: int) -> Window:
        """Only the dims from `start` to `stop`."""
        return Window(self.shape[start:stop], self.strides[start:stop], self.offset)

    def transposed(self, perm: Sequence[int]) -> Window:
        """The dims in the order `perm`."""
        return Window(tuple(self.shape[p] for p in perm), tuple(self.strides[p] for p in perm), self.offset)

    def part(self, axis: int, start: int, size: int, step: int = 1) -> Window:
        """`size` entries of `axis`, from `start` on, every `step`-th (> 0)."""
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + (start * strides[axis] if size else 0)
        shape[axis], strides[axis] = size, strides[axis] * step
        return Window(tuple(shape), tuple(strides), offset)

    def expanded(self, shape: Shape) -> Window:
        """Broadcast to `shape`."""
        new = len(shape) - len(self.shape)
        known = zip(self.shape, self.strides, shape[new:])
        strides = (0,) * new + tuple(stride if ours == size else 0 for ours, stride, size in known)
        return Window(shape, strides, self.offset)

    def reshaped(self, shape: Shape) -> Window | None:
        """The same elements in the same order in another shape; None where no strides say that."""
        if 0 in shape:
            return replace(Window.whole(shape), offset=self.offset)
        runs, strides = iter(self.runs()), []
        left, step = 1, 1
        for size in reversed(shape):
            if left == 1 and size != 1:
                left, step = next(runs)
            if left % size:
                return None
            strides.append(step)
            left, step = left // size, step * size
        return Window(shape, tuple(reversed(strides)), self.offset)
