"""Kernels that work a row at a time: norms with what is fused to them, and softmax.

A row is one thread's, one warp's or one block's, by its length. It is read once and kept in registers; a row that is
too long for that is read again for every pass. Statistics are float (double for float64): the variance is the mean of
squared distances from the mean, in a second pass over the registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxmesh.runtime.cuda.codegen.expression import Program, Scope
from onnxmesh.runtime.cuda.codegen.formulas import number
from onnxmesh.runtime.cuda.codegen.operand import Operand, Source, Unsuited, computed, source, stored
from onnxmesh.runtime.cuda.codegen.stretches import neighbours, turned
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
)
from onnxmesh.runtime.dtypes import is_narrow

CORES = frozenset("LayerNormalization RMSNormalization Softmax LogSoftmax".split())
"""The ops that work on rows."""
_KEPT = 32
"""Values of a row that a thread keeps in registers, at most."""
_AT_ONCE = 132 * 2048
"""Threads that a large GPU runs at once."""
_DEEP = 4
"""Vectors of a row that a thread takes, where the row has more than 32."""
_FEW_ROWS = 264
"""Up to so many rows, two for each multiprocessor of a large GPU, a row gets as many threads as it can use."""


@dataclass(frozen=True)
class Team:
    """The threads of a row.

    Attributes:
        threads: of one row: a power of two up to 32, or a multiple of 32.
        rows: of one block.
        rounds: how many pieces each thread takes.
        kept: whether the row stays in registers.
    """

    threads: int
    rows: int
    rounds: int
    kept: bool


def team(pieces: int, width: int, rows: int) -> Team:
    """The threads for `rows` rows of so many pieces of `width` elements."""
    deep = 1 if rows <= _FEW_ROWS else max(1, min(_DEEP, _KEPT // width))
    if pieces <= 32:
        threads = 1 << max(0, pieces - 1).bit_length()
        if rows > _FEW_ROWS and width < 8:  # more than one vector for a thread
            threads = max(1, threads // 2)
    else:
        wanted = min(1024, -(-pieces // deep))
        threads = next((n for n in _counts(wanted) if pieces % n == 0), -(-wanted // 32) * 32)
    rounds = -(-pieces // threads)
    return Team(threads, 128 // threads if threads <= 32 else 1, rounds, rounds * width <= _KEPT)


def _counts(wanted: int) -> range:
    """Numbers of threads near the wanted one."""
    first = -(-wanted // 32) * 32
    return range(first, min(1024, 2 * first) + 1, 32)


def rows(program: Program, results: Sequence[tuple[int, Operand]], kind: str) -> Source:
    """One kernel for a program with one op of `CORES`.

    Args:
        results: (value, where it goes): the program's last value, then perhaps what the op of `CORES` reads.

    Raises:
        Unsuited: the kernel cannot be made.
    """
    return _Rows(program, results).source(kind)


class _Rows:
    def __init__(self, program: Program, results: Sequence[tuple[int, Operand]]) -> None:
        self._program, self._results = program, results
        self._core = next(i for i, step in enumerate(program.steps) if step.op in CORES) + len(program.inputs)
        self._step = program.step(self._core)
        subject = self._step.operands[0]
        assert subject is not None
        self._subject = subject
        self._shape = results[0][1].shape
        if program.shapes[subject] != self._shape or any(out.shape != self._shape for _, out in results):
            raise Unsuited("a norm of another shape than the result")
        self._inputs = [i for i, x in enumerate(program.inputs) if x is not None and program.readers[i]]
        given = [program.inputs[i] for i in self._inputs]
        self._operands = [*(x for x in given if x is not None), *(out for _, out in results)]
        self._kind = computed(program.dtypes[subject])
        if self._kind not in ("float", "double"):
            raise Unsuited("a norm of integers")
        self._within()

    def _within(self) -> None:
        """Row dims, the dims of rows, and the elements of one thread."""
        rank, first = len(self._shape), self._step.attrs.get("axis", -1) % max(1, len(self._shape))
        one = self._step.op in ("Softmax", "LogSoftmax")
        inside = [first] if one else list(range(first, rank))
        outside = [i for i in range(rank) if i not in inside]
        rotary = self._program.rotary
        if rotary is None:
            strides = [x.broadcast(self._shape) for x in self._operands]
            row = merged(dims_of([self._shape[i] for i in inside], [[s[i] for i in inside] for s in strides]))
            if len(row) > 1:
                raise Unsuited("a row that is not one dim")
            inner = row[0] if row else Dim(1, (0,) * len(strides))
            self._stretch = neighbours(inner, self._operands, len(self._results))
        elif inside == [rank - 1]:
            strides = [(*x.viewed(x.shape[:-1], x.strides[:-1]).broadcast(self._shape[:-1]), 0) for x in self._operands]
            interleaved = bool(rotary.attrs.get("interleaved", 0))
            self._stretch = turned(self._operands, self._shape[-1], interleaved, len(self._results))
        else:
            raise Unsuited("a Rotary in rows of several dims")
        self._width, self._pieces = self._stretch.width, self._stretch.pieces
        self._length = self._pieces.size * self._width
        self._dims = merged(dims_of([self._shape[i] for i in outside], [[s[i] for i in outside] for s in strides]))
        self._rows = math.prod(dim.size for dim in self._dims)
        check_count(self._rows)
        self._team = team(self._pieces.size, self._width, self._rows)
        self._index = index_type([*self._dims, Dim(2 * self._pieces.size, self._pieces.strides)])

    def source(self, kind: str) -> Source:
        """The whole kernel."""
        t, block = self._team, self._team.threads * self._team.rows
        body = [
            f"const unsigned t = threadIdx.x % {t.threads}u;",
            f"const unsigned wanted = blockIdx.x * {t.rows}u + threadIdx.x / {t.threads}u;",
            f"const bool live = wanted < {self._rows}u;",
            f"const unsigned row = live ? wanted : {self._rows - 1}u;",
            *coordinates(self._dims, "row", "r"),
        ]
        for n in range(len(self._operands)):
            body.append(f"const {self._index} base{n} = {offset(self._dims, n, 'r', self._index)};")
        if t.kept:
            body.append(f"{self._kind} kept[{t.rounds}][{self._width}];")
        body += self._early()
        body += getattr(self, f"_{self._step.op.lower()}")()
        parameters = [
            *((f"const {stored(self._operands[n].dtype)}* __restrict__ in{i}", i) for n, i in enumerate(self._inputs)),
            *((f"{stored(out.dtype)}* __restrict__ out{n}", -1 - n) for n, (_, out) in enumerate(self._results)),
        ]
        return source(kind, parameters, body, -(-self._rows // t.rows), block)

    def _early(self) -> list[str]:
        """C++ that reads before the sums what is needed after them, where all rows run at once and waiting counts."""
        t = self._team
        self._ready: dict[int, tuple[str, int]] = {}
        if not t.kept or t.threads != self._pieces.size or self._rows * t.threads > _AT_ONCE:
            return []
        scope = self._scope("w")
        for i in sorted(self._program.inputs_of(self._results[0][0], self._subject)):
            self._ready[i] = scope.value(i)
        return ["const unsigned c = t;", *scope.lines] if self._ready else []

    def _layernormalization(self) -> list[str]:
        epsilon = number(self._step.attrs.get("epsilon", 1e-5), self._kind)
        return [
            *self._reduced("total", "0", "Add", lambda x: [f"total += {x};"], first=True),
            f"const {self._kind} mean = total / {number(self._length, self._kind)};",
            *self._reduced("squares", "0", "Add", lambda x: [f"squares += ({x} - mean) * ({x} - mean);"]),
            f"const {self._kind} scale = {number(1, self._kind)} / "
            f"m::sqrt(squares / {number(self._length, self._kind)} + {epsilon});",
            *self._finished(lambda x: f"({x} - mean) * scale"),
        ]

    def _rmsnormalization(self) -> list[str]:
        epsilon = number(self._step.attrs.get("epsilon", 1e-5), self._kind)
        return [
            *self._reduced("squares", "0", "Add", lambda x: [f"squares += {x} * {x};"], first=True),
            f"const {self._kind} scale = {number(1, self._kind)} / "
            f"m::sqrt(squares / {number(self._length, self._kind)} + {epsilon});",
            *self._finished(lambda x: f"{x} * scale"),
        ]

    def _softmax(self) -> list[str]:
        exp, kept = f"{self._functions}::exp", self._team.kept
        power = f"{exp}({{}} - highest)"

        def add(x: str) -> list[str]:
            return [f"{x} = {power.format(x)};", f"total += {x};"] if kept else [f"total += {power.format(x)};"]

        return [
            *self._highest(),
            *self._reduced("total", "0", "Add", add),
            f"const {self._kind} scale = {number(1, self._kind)} / total;",
            *self._finished(lambda x: f"{x if kept else power.format(x)} * scale"),
        ]

    def _logsoftmax(self) -> list[str]:
        exp = f"{self._functions}::exp"
        return [
            *self._highest(),
            *self._reduced("total", "0", "Add", lambda x: [f"total += {exp}({x} - highest);"]),
            f"const {self._kind} logarithm = m::log(total);",
            *self._finished(lambda x: f"{x} - highest - logarithm"),
        ]

    def _highest(self) -> list[str]:
        lowest = number(-math.inf, self._kind)
        return self._reduced(
            "highest", lowest, "Maximum", lambda x: [f"highest = m::maximum(highest, {x});"], first=True
        )

    @property
    def _functions(self) -> str:
        return "fast" if is_narrow(self._program.dtypes[self._subject]) else "m"

    def _reduced(
        self, name: str, start: str, function: str, each: Callable[[str], list[str]], *, first: bool = False
    ) -> list[str]:
        """C++ that makes `name` the reduction over the row, known to all of its threads.

        Args:
            each: from an element of what is reduced the C++ that adds it.
            first: whether this is the pass that reads the row.
        """
        scope = self._scope()
        array = self._row(scope, first=first)
        lines = [*scope.lines]
        if first and len(self._results) > 1:
            lines += self._store(1, array, self._width)
        lines.append(loop(self._width, " ".join(["{", *each(f"{array}[e]"), "}"])))
        if first and self._team.kept:
            lines.append(loop(self._width, f"kept[k][e] = {array}[e];"))
        threads = self._team.threads
        return [
            f"{self._kind} {name} = {start};",
            *self._pass(lines),
            f"__shared__ {self._kind} {name}_parts[{max(1, threads // 32)}];",
            f"{name} = all_reduce<{threads}>({name}, {function}(), {name}_parts);",
        ]

    def _row(self, scope: Scope, *, first: bool) -> str:
        """The array of a piece of the row, as wide as the thread's elements: computed, or what was kept of it."""
        if self._team.kept and not first:
            return "kept[k]"
        name, width = scope.value(self._subject)
        if width == self._width:
            return name
        scope.lines += [f"{self._kind} whole[{self._width}];", loop(self._width, f"whole[e] = {name}[0];")]
        return "whole"

    def _finished(self, each: Callable[[str], str]) -> list[str]:
        """C++ for the last pass: the norm's result by `each`, what comes after it, and the store."""
        scope = self._scope()
        for i, (name, width) in self._ready.items():
            scope.define(i, name, width)
        array = self._row(scope, first=False)
        scope.define(self._subject, array, self._width)
        scope.lines += [f"{self._kind} normed[{self._width}];"]
        scope.lines.append(loop(self._width, f"normed[e] = {each(f'{array}[e]')};"))
        for operand, symbol in zip(self._step.operands[1:], "*+"):
            if operand is not None:
                text = scope.at(operand, "e")
                scope.lines.append(loop(self._width, f"normed[e] = normed[e] {symbol} ({self._kind}){text};"))
        scope.define(self._core, "normed", self._width)
        name, width = scope.value(self._results[0][0])
        return self._pass([*scope.lines, *self._store(0, name, width)])

    def _pass(self, lines: Sequence[str]) -> list[str]:
        """C++ that runs `lines` for each of the thread's pieces, whose first position is `p`."""
        t, pieces = self._team, self._pieces.size
        if not t.kept:
            return [f"for (unsigned c = t; c < {pieces}u; c += {t.threads}u) {{", *lines, "}"]
        guard = "" if t.rounds * t.threads == pieces else f"if (c < {pieces}u) "
        return [
            "#pragma unroll",
            f"for (int k = 0; k < {t.rounds}; ++k) {{ const unsigned c = k * {t.threads}u + t; {guard}{{",
            *lines,
            "} }",
        ]

    def _store(self, result: int, name: str, width: int) -> list[str]:
        access = self._at(len(self._inputs) + result, f"out{result}")
        if self._rows % self._team.rows == 0:
            return access.store(name, width)
        return ["if (live) {", *access.store(name, width), "}"]

    def _scope(self, prefix: str = "v") -> Scope:
        def access(i: int) -> Access:
            return self._at(self._inputs.index(i), f"in{i}")

        return Scope(self._program, self._width, access, self._stretch.partners, prefix)

    def _at(self, n: int, pointer: str) -> Access:
        operand, stride = self._operands[n], self._pieces.strides[n]
        base = f"base{n} + ({self._index})c * {stride}" if stride else f"base{n}"
        return Access(
            operand, pointer, base, self._stretch.steps[n], alignment(operand, [*self._dims, self._pieces], n)
        )
