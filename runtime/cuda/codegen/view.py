"""Arrays as addresses with shapes and strides, which can be sliced and permuted without an array library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxmesh.runtime.cuda.codegen.operand import MOST, Operand, Unsuited
from onnxmesh.runtime.kernels.registry import Array

_WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


@dataclass(frozen=True)
class View:
    """Elements of `itemsize` bytes in memory, whatever they mean. Strides are in elements."""

    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int

    @staticmethod
    def of(array: Array) -> View:
        """The view that a NumPy or CuPy array is. Raises Unsuited for strides between elements."""
        operand = Operand.of(array)
        return View(operand.itemsize, operand.shape, operand.strides, address(array))

    @property
    def operand(self) -> Operand:
        """What a generator needs of it; unsigned integers stand for its elements."""
        if self.itemsize not in _WORDS:
            raise Unsuited(f"elements of {self.itemsize} bytes")
        kind = np.dtype(_WORDS[self.itemsize])
        return Operand(kind, self.shape, self.strides, math.gcd(self.address, MOST))

    @property
    def is_contiguous(self) -> bool:
        """Whether it is row-major without gaps."""
        step = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides)):
            if n != 1 and stride != step:
                return False
            step *= n
        return True

    def cut(self, dim: int, start: int, count: int, step: int = 1) -> View:
        """`count` entries of a dim from `start` on."""
        strides, shape = list(self.strides), list(self.shape)
        shape[dim], strides[dim] = count, self.strides[dim] * step
        at = self.address + start * self.strides[dim] * self.itemsize
        return View(self.itemsize, tuple(shape), tuple(strides), at)

    def permuted(self, order: Sequence[int]) -> View:
        """With its dims in another order."""
        shape, strides = tuple(self.shape[i] for i in order), tuple(self.strides[i] for i in order)
        return View(self.itemsize, shape, strides, self.address)

    def broadcast(self, shape: tuple[int, ...]) -> View:
        """Broadcast to a shape. Raises Unsuited where it does not."""
        strides = Operand(np.dtype("uint8"), self.shape, self.strides).broadcast(shape)
        return View(self.itemsize, shape, strides, self.address)

    def reshaped(self, shape: tuple[int, ...]) -> View:
        """In another shape of as many elements. Raises Unsuited where that takes more than splitting dims."""
        if self.is_contiguous:
            steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            return View(self.itemsize, shape, tuple(steps), self.address)
        strides, pending = [], list(zip(self.shape, self.strides))
        for n in reversed(shape):
            while pending and pending[-1][0] == 1 and n != 1:
                pending.pop()
            size, stride = pending[-1] if n != 1 and pending else (1, 0)
            if n == 1:
                strides.append(0)
                continue
            if size % n:
                raise Unsuited(f"{self.shape} as {shape}")
            strides.append(stride)
            pending[-1] = (size // n, stride * n)
        return View(self.itemsize, shape, tuple(reversed(strides)), self.address)


def address(array: Array) -> int:
    """Where a NumPy or CuPy array begins."""
    return int(array.ctypes.data) if isinstance(array, np.ndarray) else int(array.data.ptr)


def refined(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The coarsest shape whose dims are parts of the dims of both. Raises Unsuited where there is none."""
    ends = set()
    for shape in (a, b):
        total = 1
        for n in reversed(shape):
            total *= n
            ends.add(total)
    sizes, last = [], 1
    for end in sorted(ends):
        if end % last:
            raise Unsuited(f"{a} and {b} have no common parts")
        sizes.append(end // last)
        last = end
    return tuple(reversed(sizes))
