"""Kernels of reductions over any dims. Half precision and float32 sum in float, integers in their own type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxmesh.runtime.cuda.codegen.formulas import number
from onnxmesh.runtime.cuda.codegen.operand import Operand, Source, Unsuited, computed, source, stored
from onnxmesh.runtime.cuda.codegen.tiles import (
    Access,
    Dim,
    alignment,
    check_count,
    coordinates,
    dims_of,
    index_type,
    loop,
    merged,
    offset,
    vector,
)


@dataclass(frozen=True)
class _Reduction:
    """C++ of a reduction: `start` named or a number, what joins two parts, an entry before and the result after it."""

    start: float | str
    join: str
    entry: str = "{}"
    result: str = "{}"
    floats: bool = False


_REDUCTIONS = {
    "ReduceSum": _Reduction(0, "Add"),
    "ReduceMean": _Reduction(0, "Add", result="{} / {count}", floats=True),
    "ReduceMax": _Reduction("lowest", "Maximum"),
    "ReduceMin": _Reduction("highest", "Minimum"),
    "ReduceProd": _Reduction(1, "Multiply"),
    "ReduceL1": _Reduction(0, "Add", entry="m::absolute({})"),
    "ReduceL2": _Reduction(0, "Add", entry="({0} * {0})", result="m::sqrt({})", floats=True),
    "ReduceSumSquare": _Reduction(0, "Add", entry="({0} * {0})"),
    "ReduceLogSum": _Reduction(0, "Add", result="m::log({})", floats=True),
}
REDUCTIONS = frozenset(_REDUCTIONS)
"""The ops of this family."""
_LANES = 32
_BLOCKS = 256
"""Where results lie side by side, threads take fewer of them until there are so many blocks."""


def reduction(op: str, x: Operand, out: Operand, axes: Sequence[int]) -> Source:
    """A kernel that reduces x over `axes` into `out`, which has the other dims, with or without those of size 1.

    Raises:
        Unsuited: the kernel cannot be made.
    """
    return _Kernel(op, x, out, axes).source()


class _Kernel:
    def __init__(self, op: str, x: Operand, out: Operand, axes: Sequence[int]) -> None:
        self._op, self._how, self._x, self._out = op, _REDUCTIONS[op], x, out
        self._kind = computed(x.dtype)
        if self._kind == "bool" or (self._how.floats and self._kind not in ("float", "double")):
            raise Unsuited(f"{op} of {x.dtype}")
        if not x.size:
            raise Unsuited("a reduction of nothing")
        check_count(x.size)
        inside = {axis % len(x.shape) for axis in axes}
        kept = [i for i in range(len(x.shape)) if i not in inside]
        writes = [s for n, s in zip(out.shape, out.strides) if n != 1]
        steps = iter(writes)
        places = [next(steps) if x.shape[i] != 1 else 0 for i in kept]
        self._kept = merged(dims_of([x.shape[i] for i in kept], [[x.strides[i] for i in kept], places]))
        order = sorted(inside, key=lambda i: -abs(x.strides[i]))
        self._summed = merged(dims_of([x.shape[i] for i in order], [[x.strides[i] for i in order], [0] * len(order)]))
        self._count = math.prod(d.size for d in self._summed)

    def source(self) -> Source:
        """The kernel: a team of threads for each result, or where those lie side by side, threads for many results."""
        inner = self._summed[-1].strides[0] if self._summed else 1
        columns = [d for d in self._kept if abs(d.strides[0]) == 1 and d.size >= _LANES]
        body, grid, block = self._columns(columns[0]) if columns and abs(inner) != 1 else self._rows()
        parameters = [
            (f"const {stored(self._x.dtype)}* __restrict__ in0", 0),
            (f"{stored(self._out.dtype)}* __restrict__ out0", -1),
        ]
        return source(self._op.lower(), parameters, body, grid, block)

    def _rows(self) -> tuple[list[str], int, int]:
        inner = self._summed[-1] if self._summed else Dim(1, (0, 0))
        width = vector(inner.size, inner.strides[:1], (self._x,))
        pieces = merged([*self._summed[:-1], Dim(inner.size // width, tuple(s * width for s in inner.strides))])
        count, results = math.prod(d.size for d in pieces), math.prod(d.size for d in self._kept)
        threads = min(256 if results > 264 else 1024, 1 << max(0, count - 1).bit_length())
        teams = max(1, 128 // threads) if threads <= 32 else 1
        index = index_type([*self._kept, *self._summed])
        offsets = tuple(e * inner.strides[0] for e in range(width))
        base = f"base + {offset(pieces, 0, 'p', index)}"
        access = Access(self._x, "in0", base, offsets, alignment(self._x, [*self._kept, *pieces], 0))
        body = [
            f"const unsigned t = threadIdx.x % {threads}u;",
            f"const unsigned wanted = blockIdx.x * {teams}u + threadIdx.x / {threads}u;",
            f"const unsigned result = wanted < {results}u ? wanted : {results - 1}u;",
            *coordinates(self._kept, "result", "r"),
            f"const {index} base = {offset(self._kept, 0, 'r', index)};",
            f"{self._kind} total = {self._start()};",
            f"for (unsigned piece = t; piece < {count}u; piece += {threads}u) {{",
            *coordinates(pieces, "piece", "p"),
            *access.load("v"),
            loop(width, f"total = {self._joined('total', 'v[e]' if access.width > 1 else 'v[0]')};"),
            "}",
            f"__shared__ {self._kind} parts[{max(1, threads // 32)}];",
            f"total = all_reduce<{threads}>(total, {self._how.join}(), parts);",
            f"if (t == 0 && wanted < {results}u) {{",
            f"const {self._kind} y[1] = {{{self._result('total')}}};",
            f"put(out0 + {offset(self._kept, 1, 'r', index)}, y);",
            "}",
        ]
        return body, -(-results // teams), threads * teams

    def _columns(self, column: Dim) -> tuple[list[str], int, int]:
        """A block for 32 vectors of results side by side; 8 or 32 warps share what is summed."""
        rest = [d for d in self._kept if d is not column]
        others, splits = math.prod(d.size for d in rest), 8 if self._count < 256 else 32
        width = min(8, vector(column.size, column.strides[:1], (self._x,)))
        while width > 1 and column.size * others < _BLOCKS * _LANES * width:
            width //= 2
        vectors = column.size // width
        across, index = -(-vectors // _LANES), index_type([*self._kept, *self._summed])
        step = column.strides[0] * width
        base = f"base + ({index})lane * {step} + {offset(self._summed, 0, 'p', index)}"
        pieces = Dim(vectors, tuple(s * width for s in column.strides))
        offsets = tuple(e * column.strides[0] for e in range(width))
        aligned = alignment(self._x, [*rest, pieces, *self._summed], 0)
        access = Access(self._x, "in0", base, offsets, aligned)
        kind = self._kind
        places = tuple(e * column.strides[1] for e in range(width))
        where = f"{offset(rest, 1, 'r', index)} + ({index})lane * {column.strides[1] * width}"
        writing = Access(self._out, "out0", where, places, alignment(self._out, [*rest, pieces], 1))
        body = [
            f"const unsigned x = threadIdx.x % {_LANES}u, y = threadIdx.x / {_LANES}u;",
            f"const unsigned lane = blockIdx.x % {across}u * {_LANES}u + x;",
            *coordinates(rest, f"(blockIdx.x / {across}u)", "r"),
            f"const {index} base = {offset(rest, 0, 'r', index)};",
            f"{kind} total[{width}];",
            loop(width, f"total[e] = {self._start()};"),
            f"if (lane < {vectors}u)",
            f"for (unsigned piece = y; piece < {self._count}u; piece += {splits}u) {{",
            *coordinates(self._summed, "piece", "p"),
            *access.load("v"),
            loop(width, f"total[e] = {self._joined('total[e]', 'v[e]' if access.width > 1 else 'v[0]')};"),
            "}",
            f"__shared__ {kind} parts[{splits}][{width}][{_LANES}];",
            loop(width, "parts[y][e][x] = total[e];"),
            "__syncthreads();",
            f"if (y || lane >= {vectors}u) return;",
            f"for (int k = 1; k < {splits}; ++k)",
            loop(width, f"total[e] = {self._how.join}()(total[e], parts[k][e][x]);"),
            loop(width, f"total[e] = {self._result('total[e]')};"),
            *writing.store("total", width),
        ]
        return body, across * others, _LANES * splits

    def _start(self) -> str:
        start = self._how.start
        if isinstance(start, str) and self._kind in ("float", "double"):
            start = -math.inf if start == "lowest" else math.inf
        elif isinstance(start, str):
            limits = np.iinfo(self._x.dtype)
            start = int(limits.min if start == "lowest" else limits.max)
        return number(start, self._kind)

    def _joined(self, total: str, entry: str) -> str:
        return f"{self._how.join}()({total}, ({self._kind}){self._how.entry.format(entry)})"

    def _result(self, total: str) -> str:
        return f"({self._kind})({self._how.result.format(total, count=number(self._count, self._kind))})"
