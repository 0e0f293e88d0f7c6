"""From arrays to what a GEMM library is asked for: sizes, leading dimensions, batch steps. No GPU is needed here.

A contraction is a loop nest: every loop has a size and, for each array, a stride. Loops that no array keeps apart are
merged; what remains is named by who moves: rows move the first operand and the result, columns the second and the
result, sums both operands and not the result. All else is a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

from onnxmesh.runtime.kernels.registry import Array

ALIGNMENT = 256
"""Bytes; a library makes no use of more."""
MOST_LAUNCHES = 64
FLOATS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""The dtypes that are multiplied, and their bytes."""

Strides = tuple[int, ...]
FIRST, SECOND, OUT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Operand:
    """A batch of row-major matrices in memory, in elements.

    Attributes:
        transposed: the memory holds the transposed matrix.
        leading: from one row (in memory) to the next.
        step: from one matrix of the batch to the next; 0: there is one for all.
        alignment: bytes, of every matrix that is launched by itself.
    """

    transposed: bool
    leading: int
    step: int
    alignment: int


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What is done to a product before it is stored: + bias[n], then the activation; or + residual[m, n].

    Attributes:
        bias: whether there is one number a column.
        activation: `relu`, `gelu` (by tanh), `erf_gelu`, `swish`, or empty.
        residual: where the residual's matrices are.
    """

    bias: bool = False
    activation: str = ""
    residual: Operand | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """out[i] = epilogue(a[i] b[i]) for a [m, k], b [k, n], out [m, n], i < batch; `out` is never transposed.

    Attributes:
        multiprocessors: how many it is to fill; 0: all.
    """

    dtype: str
    m: int
    n: int
    k: int
    batch: int
    a: Operand
    b: Operand
    out: Operand
    epilogue: Epilogue = Epilogue()
    multiprocessors: int = 0


@dataclass(frozen=True, slots=True)
class Contraction:
    """A problem, and for every launch of it the addresses of a, b, out, then bias and residual if there are any."""

    problem: Problem
    addresses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop of a contraction: its size, and every array's stride in elements."""

    size: int
    strides: Strides


def matmul_loops(a: Array, b: Array, out: Array, *extra: Array) -> list[Loop]:
    """The loops of numpy.matmul(a, b) -> out; `extra` arrays broadcast to `out`."""
    first = ["k"] if a.ndim == 1 else [*_names(a.ndim - 2), "m", "k"]
    second = ["k"] if b.ndim == 1 else [*_names(b.ndim - 2), "k", "n"]
    kept = max((first, second), key=len)[: max(a.ndim, b.ndim, 2) - 2]
    result = [*kept, *(["m"] if a.ndim > 1 else []), *(["n"] if b.ndim > 1 else [])]
    return loops([(first, a), (second, b), (result, out), *((result[len(result) - x.ndim :], x) for x in extra)])


def loops(terms: Sequence[tuple[Sequence[str], Array]]) -> list[Loop]:
    """One loop a label; each array comes with a label for every dim. A dim of size 1 broadcasts."""
    sizes: dict[str, int] = {}
    for labels, array in terms:
        for label, size in zip(labels, array.shape, strict=True):
            sizes[label] = size if size != 1 else sizes.get(label, 1)
    strides = [_strides(labels, array) for labels, array in terms]
    return [Loop(size, tuple(of.get(label, 0) for of in strides)) for label, size in sizes.items() if size != 1]


def contraction(
    dtype: str, nest: Sequence[Loop], addresses: Sequence[int], activation: str = "", *, bias: bool = False
) -> Contraction | None:
    """The problem of a loop nest; None where a strided batch of matrices, launched a few times, does not hold it.

    Args:
        nest: its loops, none of size 0; arrays are the two operands, the result, then the bias if there is one, then
            the residual if there is one.
        addresses: where the arrays start.
        activation: see Epilogue.
    """
    if _columns_are_the_firsts(nest):  # of the transposed problem they are the second's, as it must be
        order = (SECOND, FIRST, *range(OUT, len(addresses)))
        nest = [Loop(loop.size, tuple(loop.strides[i] for i in order)) for loop in nest]
        addresses = [addresses[i] for i in order]
    found = _matrices(nest, len(addresses))
    if found is None or (bias and not _is_row(found)):
        return None
    item, starts = FLOATS[dtype], _starts(found.launches, len(addresses))
    operands = []
    for i, address in enumerate(addresses):
        aligned = gcd(ALIGNMENT, address, *(item * start[i] for start in starts), item * found.batch.strides[i])
        operands.append(_operand(*found.matrix(i), i, found.batch.strides[i], aligned))
    a, b, out, *rest = operands
    residual = rest[bias] if len(rest) > bias else None
    if a is None or b is None or out is None or out.transposed:
        return None
    if len(rest) > bias and (residual is None or residual.transposed):
        return None
    epilogue = Epilogue(bias, activation, residual)
    m, n, k, batch = found.rows.size, found.columns.size, found.sums.size, found.batch.size
    launches = tuple(tuple(at + item * x for at, x in zip(addresses, start)) for start in starts)
    return Contraction(Problem(dtype, m, n, k, batch, a, b, out, epilogue), launches)


# --- loops --------------------------------------------------------------------------------------------------


def _names(count: int) -> list[str]:
    """Labels of leading dims, counted from the last."""
    return [str(i) for i in reversed(range(count))]


def _strides(labels: Sequence[str], array: Array) -> Mapping[str, int]:
    """Per label, in elements; 0 where the array has one for all."""
    return {
        label: stride // array.itemsize for label, stride, size in zip(labels, array.strides, array.shape) if size != 1
    }


def _columns_are_the_firsts(nest: Sequence[Loop]) -> bool:
    """Whether the result is contiguous along a loop of the first operand."""
    return any(loop.strides[OUT] == 1 and not loop.strides[SECOND] for loop in nest)


def _merged(nest: Sequence[Loop], along: int) -> list[Loop]:
    """Loops of which no array keeps the parts apart, as one; from the outermost to the innermost by one array."""
    result: list[Loop] = []
    for loop in sorted(nest, key=lambda loop: -loop.strides[along]):
        last = result[-1] if result else None
        if last is not None and all(far == near * loop.size for far, near in zip(last.strides, loop.strides)):
            result[-1] = Loop(last.size * loop.size, loop.strides)
        else:
            result.append(loop)
    return result


@dataclass(frozen=True, slots=True)
class _Matrices:
    """The loops of a contraction by what they are; `launches` are done one by one."""

    rows: Loop
    columns: Loop
    sums: Loop
    batch: Loop
    launches: Sequence[Loop]

    def matrix(self, array: int) -> tuple[Loop, Loop]:
        """The loops over the rows and the columns of an array."""
        return self.sums if array == SECOND else self.rows, self.sums if array == FIRST else self.columns


def _matrices(nest: Sequence[Loop], arrays: int) -> _Matrices | None:
    kinds: dict[str, list[Loop]] = {"rows": [], "columns": [], "sums": [], "batch": []}
    for loop in nest:
        kinds[_kind(loop)].append(loop)
    one = Loop(1, (0,) * arrays)
    sums = _merged(kinds["sums"], FIRST)
    rows, other_rows = _largest(_merged(kinds["rows"], OUT), one)
    columns, other_columns = _innermost(_merged(kinds["columns"], OUT), one)
    batch, launches = _largest(_merged([*kinds["batch"], *other_rows, *other_columns], OUT), one)
    if len(sums) > 1 or prod(loop.size for loop in launches) > MOST_LAUNCHES:
        return None
    return _Matrices(rows, columns, sums[0] if sums else one, batch, launches)


def _kind(loop: Loop) -> str:
    if not loop.strides[OUT]:
        return "sums"
    if bool(loop.strides[FIRST]) == bool(loop.strides[SECOND]):
        return "batch"
    return "rows" if loop.strides[FIRST] else "columns"


def _largest(choices: Sequence[Loop], default: Loop) -> tuple[Loop, Sequence[Loop]]:
    """The largest of some loops, and the others."""
    best = max(choices, key=lambda loop: loop.size, default=default)
    return best, [loop for loop in choices if loop is not best]


def _innermost(choices: Sequence[Loop], default: Loop) -> tuple[Loop, Sequence[Loop]]:
    return (choices[-1], choices[:-1]) if choices else (default, ())


def _is_row(found: _Matrices) -> bool:
    """Whether the array after the result holds one number a column."""
    others = (found.rows, found.batch, *found.launches)
    return found.columns.strides[OUT + 1] == 1 and not any(loop.strides[OUT + 1] for loop in others)


def _starts(outer: Sequence[Loop], count: int) -> list[tuple[int, ...]]:
    """Where every array starts for each launch, in elements."""
    places = product(*(range(loop.size) for loop in outer))
    return [
        tuple(sum(at * loop.strides[i] for at, loop in zip(place, outer)) for i in range(count)) for place in places
    ]


def _operand(rows: Loop, columns: Loop, array: int, step: int, alignment: int) -> Operand | None:
    """The matrices of an array, if a library can read them: rows or columns contiguous."""
    row, column = rows.strides[array], columns.strides[array]
    if (column == 1 or columns.size == 1) and (row >= columns.size or rows.size == 1):
        return Operand(False, max(row, columns.size), step, alignment)
    if (row == 1 or rows.size == 1) and (column >= rows.size or columns.size == 1):
        return Operand(True, max(column, rows.size), step, alignment)
    return None
