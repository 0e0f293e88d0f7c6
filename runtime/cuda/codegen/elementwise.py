"""Kernels of elementwise expressions over arrays of any layout, and of a Rotary within them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxmesh.runtime.cuda.codegen.expression import Program, Scope
from onnxmesh.runtime.cuda.codegen.operand import Operand, Source, Unsuited, source, stored
from onnxmesh.runtime.cuda.codegen.stretches import Stretch, neighbours, turned
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
        outer, self._stretch = self._plain() if program.rotary is None else self._rotary()
        self._dims = merged([*outer, self._stretch.pieces])
        spans = Dim(2, tuple(max(map(abs, steps)) for steps in self._stretch.steps))
        self._index = index_type([*self._dims, spans])
        self._threads = math.prod(dim.size for dim in self._dims)
        check_count(self._threads)

    def _plain(self) -> tuple[list[Dim], Stretch]:
        """Threads walk over merged dims, in the order of the first output's memory."""
        strides = [x.broadcast(self._shape) for x in self._operands]
        lead = len(self._inputs)
        order = sorted(range(len(self._shape)), key=lambda i: -abs(strides[lead][i]))
        dims = merged(dims_of([self._shape[i] for i in order], [[s[i] for i in order] for s in strides]))
        inner = dims[-1] if dims else Dim(1, (0,) * len(strides))
        return dims[:-1], neighbours(inner, self._operands, len(self._results))

    def _rotary(self) -> tuple[list[Dim], Stretch]:
        """A thread has both entries of its pairs of the last dim."""
        rotary = self._program.rotary
        assert rotary is not None and rotary.operands[0] is not None
        if self._program.shapes[rotary.operands[0]] != self._shape:
            raise Unsuited("a Rotary of another shape than the result")
        interleaved = bool(rotary.attrs.get("interleaved", 0))
        outer = [x.viewed(x.shape[:-1], x.strides[:-1]).broadcast(self._shape[:-1]) for x in self._operands]
        stretch = turned(self._operands, self._shape[-1], interleaved, len(self._results))
        return dims_of(self._shape[:-1], outer), stretch

    def source(self, kind: str) -> Source:
        body = [f"const unsigned i = blockIdx.x * {BLOCK}u + threadIdx.x;", f"if (i >= {self._threads}u) return;"]
        body += coordinates(self._dims, "i", "c")
        scope = Scope(self._program, self._stretch.width, self._access, self._stretch.partners)
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
        return Access(operand, pointer, base, self._stretch.steps[number], aligned)
