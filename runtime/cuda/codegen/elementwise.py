"""Kernels of elementwise expressions over arrays of any layout, and of a Rotary within them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxmesh.runtime.cuda.codegen.expression import Program, Scope, pairs, twofold
from onnxmesh.runtime.cuda.codegen.operand import Operand, Source, Unsuited, source, stored
from onnxmesh.runtime.cuda.codegen.tiles import (
    Access,
    Dim,
    alignment,
    check_count,
    coordinates,
    dims_of,
    index_type,
    merged,
    offset,
    vector,
)

BLOCK = 256
"""Threads of a block."""


def elementwise(program: Program, results: Sequence[tuple[int, Operand]], kind: str = "fused") -> Source:
    """One kernel that computes several values of a program.

    Args:
        results: (value, where it goes); the first has the whole shape, to which the others broadcast.

    Raises:
        Unsuited: the kernel cannot be made.
    """
    return _Elementwise(program, results).source(kind)


class _Elementwise:
    def __init__(self, program: Program, results: Sequence[tuple[int, Operand]]) -> None:
        self._program, self._results = program, results
        self._inputs = [i for i, x in enumerate(program.inputs) if x is not None and program.readers[i]]
        self._inputs += [v for v, _ in results if program.is_input(v) and v not in self._inputs]
        given = [program.inputs[i] for i in self._inputs]
        self._operands = [*(x for x in given if x is not None), *(out for _, out in results)]
        self._shape = results[0][1].shape
        check_count(math.prod(self._shape))
        rotary = program.rotary
        self._interleaved = bool(rotary is not None and rotary.attrs.get("interleaved", 0))
        if rotary is None:
            self._plain()
        else:
            self._rotary()

    def _plain(self) -> None:
        """Threads walk over merged dims, in the order of the first output's memory."""
        strides = [x.broadcast(self._shape) for x in self._operands]
        lead = len(self._inputs)
        order = sorted(range(len(self._shape)), key=lambda i: -abs(strides[lead][i]))
        dims = merged(dims_of([self._shape[i] for i in order], [[s[i] for i in order] for s in strides]))
        inner = dims[-1] if dims else Dim(1, (0,) * len(strides))
        self._width = vector(inner.size, inner.strides, self._operands, len(self._results))
        steps = [[e * stride for e in range(self._width)] for stride in inner.strides]
        self._finish(dims[:-1], inner, self._width, steps)
        self._partners: list[tuple[int, int]] = []

    def _rotary(self) -> None:
        """The last dim is one of pairs; a thread has both places of its pairs."""
        last = self._shape[-1]
        rotary = self._program.rotary
        assert rotary is not None and rotary.operands[0] is not None
        if last % 2 or self._program.shapes[rotary.operands[0]] != self._shape:
            raise Unsuited("a Rotary of another shape than the result")
        outer = [x.viewed(x.shape[:-1], x.strides[:-1]).broadcast(self._shape[:-1]) for x in self._operands]
        places = [twofold(x, last, self._interleaved, self._shape) for x in self._operands]
        dims = merged(dims_of(self._shape[:-1], outer))
        inner = Dim(last // 2, tuple(pair for _, pair in places))
        wide = [place if self._interleaved else pair for place, pair in places]
        width = max(1, vector(last if self._interleaved else last // 2, wide, self._operands, len(self._results), 2))
        count = max(1, width // 2) if self._interleaved else width
        steps = [
            [v * pair + p * place for v in range(count) for p in (0, 1)]
            if self._interleaved
            else [v * pair + p * place for p in (0, 1) for v in range(count)]
            for place, pair in places
        ]
        self._partners = pairs(self._interleaved, count)
        self._width = 2 * count
        self._finish(dims, inner, count, steps)

    def _finish(self, outer: Sequence[Dim], inner: Dim, count: int, steps: list[list[int]]) -> None:
        """Dims for the threads: the inner one in steps of `count`."""
        self._steps = steps
        self._dims = merged([*outer, Dim(inner.size // count, tuple(s * count for s in inner.strides))])
        spans = [Dim(2, tuple(max(map(abs, s)) for s in steps))]
        self._index = index_type([*self._dims, *spans])
        self._threads = math.prod(dim.size for dim in self._dims)

    def source(self, kind: str) -> Source:
        body = [f"const unsigned i = blockIdx.x * {BLOCK}u + threadIdx.x;", f"if (i >= {self._threads}u) return;"]
        body += coordinates(self._dims, "i", "c")
        scope = Scope(self._program, self._width, self._access, self._partners)
        names = [scope.value(value) for value, _ in self._results]
        body += scope.lines
        for number, (name, width) in enumerate(names):
            at = len(self._inputs) + number
            lines = self._at(at, f"out{number}").store(name, width)
            guard = self._guard(at)
            body += [f"if ({guard}) {{", *lines, "}"] if guard else lines
        parameters = [
            *((f"const {stored(self._operands[n].dtype)}* __restrict__ in{i}", i) for n, i in enumerate(self._inputs)),
            *((f"{stored(out.dtype)}* __restrict__ out{n}", -1 - n) for n, (_, out) in enumerate(self._results)),
        ]
        return source(kind, parameters, body, -(-self._threads // BLOCK), BLOCK)

    def _guard(self, operand: int) -> str:
        """Where a smaller output is written: at 0 of the dims that it lacks."""
        return " && ".join(f"c{i} == 0" for i, dim in enumerate(self._dims) if not dim.strides[operand])

    def _access(self, value: int) -> Access:
        return self._at(self._inputs.index(value), f"in{value}")

    def _at(self, number: int, pointer: str) -> Access:
        operand = self._operands[number]
        base = offset(self._dims, number, "c", self._index)
        aligned = alignment(operand, self._dims, number)
        return Access(operand, pointer, base, tuple(self._steps[number]), aligned)
