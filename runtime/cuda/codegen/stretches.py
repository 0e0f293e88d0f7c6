"""The elements that one thread takes of the innermost dim: neighbours, or for a Rotary both entries of its pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxmesh.runtime.cuda.codegen.operand import Operand, Unsuited
from onnxmesh.runtime.cuda.codegen.tiles import Dim, vector


@dataclass(frozen=True)
class Stretch:
    """A thread's elements of a dim.

    Attributes:
        dim: the dim, or that of pairs.
        count: how many entries of the dim.
        steps: for every operand the offsets of the elements.
        partners: the pairs (first, second) of elements that a Rotary turns.
    """

    dim: Dim
    count: int
    steps: tuple[tuple[int, ...], ...]
    partners: tuple[tuple[int, int], ...] = ()

    @property
    def width(self) -> int:
        """Number of elements."""
        return len(self.steps[0])

    @property
    def pieces(self) -> Dim:
        """The dim in steps of a thread."""
        return Dim(self.dim.size // self.count, tuple(stride * self.count for stride in self.dim.strides))


def neighbours(dim: Dim, operands: Sequence[Operand], outputs: int) -> Stretch:
    """A vector of a dim. `outputs` of the operands, the last ones, are written."""
    count = vector(dim.size, dim.strides, operands, outputs)
    return Stretch(dim, count, tuple(tuple(e * stride for e in range(count)) for stride in dim.strides))


def turned(operands: Sequence[Operand], size: int, interleaved: bool, outputs: int) -> Stretch:
    """Pairs of a last dim of `size`: side by side, or else in two halves. Raises Unsuited where there are none."""
    if size % 2:
        raise Unsuited("a Rotary of an odd dim")
    strides = [_strides(operand, size, interleaved) for operand in operands]
    within, between = ([pair[i] for pair in strides] for i in (0, 1))
    dim = Dim(size // 2, tuple(between))
    if interleaved:
        count = max(1, vector(size, within, operands, outputs, 2) // 2)
        order = [(v, place) for v in range(count) for place in (0, 1)]
        partners = tuple((2 * i, 2 * i + 1) for i in range(count))
    else:
        count = vector(size // 2, between, operands, outputs)
        order = [(v, place) for place in (0, 1) for v in range(count)]
        partners = tuple((i, i + count) for i in range(count))
    steps = tuple(tuple(v * b + place * a for v, place in order) for a, b in strides)
    return Stretch(dim, count, steps, partners)


def _strides(operand: Operand, last: int, interleaved: bool) -> tuple[int, int]:
    """(stride within a pair, stride from pair to pair) of an operand in a last dim of pairs."""
    size, stride = (operand.shape[-1], operand.strides[-1]) if operand.shape else (1, 0)
    if size == 1:
        return 0, 0
    if size * 2 == last:
        return 0, stride
    if size != last:
        raise Unsuited(f"a last dim of {size} beside one of {last}")
    return (stride, 2 * stride) if interleaved else (stride * (last // 2), stride)
