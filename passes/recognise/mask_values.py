"""The numbers of a value that is computed from constants alone, a block of rows at a time.

Masks are made of shapes: a triangle of ones, comparisons of indices, a buffer of the model. They may be as large as
queries times keys, so they are never computed whole. An element is *pulled*: every op says which elements of its
inputs it reads, as far back as the constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.fold import run_reference
from onnxmesh.passes.graph.match import array, given, integer, ints, is_constant, producer, shape_of

BLOCK = 1 << 17
"""Elements that are computed at a time."""

READ = 1 << 32
"""A mask of more elements is not looked into."""

WHOLE = 1 << 20
"""Elements of a value that is computed whole, for an op that does not work element by element."""

DEPTH = 128
"""Nodes that a value may be made of."""

OPSET = 23
"""The opset whose meaning ONNX ops have in normal form."""

Index = tuple[np.ndarray, ...]
"""For every dim of a value, which elements: arrays that broadcast to the block."""

FIRST = np.zeros((), np.int64)

ELEMENTWISE = frozenset(
    "Abs Add And Cast Ceil Div Equal Floor Greater GreaterOrEqual Identity IsInf IsNaN Less LessOrEqual Max Min Mod "
    "Mul Neg Not Or Round Sign Sub Where Xor".split()
)


class Unknown(Exception):
    """The numbers cannot be told from constants."""


def blocks(value: ir.Value) -> Iterator[np.ndarray]:
    """The numbers of a value `[.., rows, columns]`, some rows at a time, in order.

    In a block the leading dims on which nothing hangs have size 1.

    Raises:
        Unknown: at the first block, where the numbers hang on an input of the graph or on too much.
    """
    shape = shape_of(value)
    if len(shape) < 2 or not 0 < math.prod(shape) <= READ or not from_constants(value):
        raise Unknown
    step = max(1, BLOCK * shape[-2] // math.prod(shape))
    puller = Puller()
    for start in range(0, shape[-2], step):
        dims = [np.arange(n) for n in shape]
        dims[-2] = dims[-2][start : start + step]
        block = puller.block(value, np.ix_(*dims))
        leading = ((1,) * (len(shape) - block.ndim) + block.shape)[:-2]
        yield np.broadcast_to(block, (*leading, dims[-2].size, shape[-1]))


def from_constants(value: ir.Value) -> bool:
    """Whether nothing but constants goes into the value, through few nodes that can be followed."""
    waiting, seen = [value], set[ir.Node]()
    while waiting:
        value = waiting.pop()
        if is_constant(value):
            if value.const_value is None:
                return False
            continue
        node = producer(value)
        if node is None or (node.op_type not in ELEMENTWISE and node.op_type not in MOVES):
            return False
        if node not in seen:
            seen.add(node)
            waiting += [v for v in node.inputs if v is not None]
        if len(seen) > DEPTH:
            return False
    return True


class Puller:
    """Computes elements of values; what several nodes of a block read is computed once."""

    def __init__(self) -> None:
        self._constants: dict[ir.Value, np.ndarray] = {}
        self._found: dict[tuple[object, ...], tuple[np.ndarray, Index]] = {}

    def block(self, value: ir.Value, index: Index) -> np.ndarray:
        """The elements of one block."""
        self._found.clear()
        return self.at(value, index)

    def at(self, value: ir.Value, index: Sequence[np.ndarray]) -> np.ndarray:
        """The elements of `value` at an index for each of its dims."""
        index = tuple(FIRST if n == 1 else i for i, n in zip(index, shape_of(value), strict=True))
        key = (value, *map(id, index))
        if key not in self._found:
            self._found[key] = self._compute(value, index), index
        return self._found[key][0]

    def _compute(self, value: ir.Value, index: Index) -> np.ndarray:
        node = producer(value)
        if node is None:
            if value not in self._constants:
                data = array(value)
                if data is None:
                    raise Unknown
                self._constants[value] = data
            return np.asarray(self._constants[value][index])
        if node.op_type not in ELEMENTWISE:
            return MOVES[node.op_type](self, node, index)
        inputs = [self.at(v, index[len(index) - len(shape_of(v)) :]) for v in node.inputs if v is not None]
        results = run_reference(node, inputs, OPSET)
        if results is None:
            raise Unknown
        return results[0]


# --- ops that move elements ---------------------------------------------------------------------------------


def _expand(puller: Puller, node: ir.Node, index: Index) -> np.ndarray:
    x = given(node, 0)
    return puller.at(x, index[len(index) - len(shape_of(x)) :])


def _reshape(puller: Puller, node: ir.Node, index: Index) -> np.ndarray:
    """Only where the dims larger than 1 change is the place of an element counted."""
    x = given(node, 0)
    before, after = shape_of(x), shape_of(node.outputs[0])
    large = [i for i, n in zip(index, after) if n != 1]
    if [n for n in before if n != 1] == [n for n in after if n != 1]:
        found = iter(large)
        return puller.at(x, [FIRST if n == 1 else next(found) for n in before])
    place = np.zeros((), np.int64)
    for i, n in zip(index, after):
        place = place * n + i
    dims = np.unravel_index(place, before) if before else ()
    return puller.at(x, [np.asarray(d) for d in dims])


def _transpose(puller: Puller, node: ir.Node, index: Index) -> np.ndarray:
    perm = ints(node, "perm") or tuple(reversed(range(len(index))))
    return puller.at(given(node, 0), [index[perm.index(i)] for i in range(len(perm))])


def _slice(puller: Puller, node: ir.Node, index: Index) -> np.ndarray:
    moved = list(index)
    for axis, start, step in zip(ints(node, "axes"), ints(node, "starts"), ints(node, "steps")):
        moved[axis] = start + step * moved[axis]
    return puller.at(given(node, 0), moved)


def _concat(puller: Puller, node: ir.Node, index: Index) -> np.ndarray:
    axis, start = integer(node, "axis") % len(index), 0
    result: np.ndarray | None = None
    for x in node.inputs:
        assert x is not None
        size = shape_of(x)[axis]
        inside = np.clip(index[axis] - start, 0, max(0, size - 1))
        if size:
            part = puller.at(x, (*index[:axis], inside, *index[axis + 1 :]))
            result = part if result is None else np.where(index[axis] >= start, part, result)
        start += size
    if result is None:
        raise Unknown
    return result


def _gather(puller: Puller, node: ir.Node, index: Index) -> np.ndarray:
    x, places = given(node, 0), given(node, 1)
    axis, rank = integer(node, "axis") % len(shape_of(x)), len(shape_of(places))
    found = puller.at(places, index[axis : axis + rank]).astype(np.int64)
    found = np.where(found < 0, found + shape_of(x)[axis], found)
    return puller.at(x, (*index[:axis], found, *index[axis + rank :]))


def _trilu(puller: Puller, node: ir.Node, index: Index) -> np.ndarray:
    x = puller.at(given(node, 0), index)
    distance, k = index[-1] - index[-2], integer(node, "k")
    kept = distance >= k if integer(node, "upper", 1) else distance <= k
    return np.where(kept, x, np.zeros((), x.dtype))


def _cumsum(puller: Puller, node: ir.Node, index: Index) -> np.ndarray:
    x = given(node, 0)
    shape = shape_of(x)
    if math.prod(shape) > WHOLE:
        raise Unknown
    data = np.broadcast_to(puller.at(x, np.ix_(*(np.arange(n) for n in shape))), shape)
    axis, reverse = integer(node, "axis") % len(shape), integer(node, "reverse")
    data = np.flip(data, axis) if reverse else data
    sums = np.cumsum(data, axis, dtype=data.dtype)
    sums = sums - data if integer(node, "exclusive") else sums
    return np.asarray((np.flip(sums, axis) if reverse else sums)[index])


MOVES: dict[str, Callable[[Puller, ir.Node, Index], np.ndarray]] = {
    "Concat": _concat,
    "CumSum": _cumsum,
    "Expand": _expand,
    "Gather": _gather,
    "Reshape": _reshape,
    "Slice": _slice,
    "Transpose": _transpose,
    "Trilu": _trilu,
}
