"""Kernels that walk along one dim of few entries: TopK, ArgMax, ArgMin, CumSum. One thread has one row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxmesh.runtime.cuda.codegen.operand import Operand, Source, Unsuited, computed, source, stored
from onnxmesh.runtime.cuda.codegen.tiles import Dim, check_count, coordinates, dims_of, index_type, merged, offset

BLOCK = 128
_MOST = 512
"""Entries of a row, for which one thread is enough."""


def top_k(
    x: Operand,
    values: Operand | None,
    indices: Operand,
    axis: int,
    k: int,
    *,
    largest: bool,
    nan_first: bool,
    last: bool,
) -> Source:
    """The `k` greatest (or least) entries along `axis`, in order.

    Args:
        values: where the entries go, if wanted; `values` and `indices` have x's rank.
        nan_first: whether NaN comes before every number, or after.
        last: of equal entries the last comes first.
    """
    outs = [out for out in (values, indices) if out is not None]
    rows, kind = _Rows(x, outs, axis), computed(x.dtype)
    sign, nan = ">" if largest else "<", "a != a && b == b" if nan_first else "a == a && b != b"
    body = [
        *rows.head(),
        f"const auto less = [](const {kind} a, const {kind} b) {{ return a {sign} b || ({nan}); }};",
        f"const auto before = [&](const {kind} a, const int i, const {kind} b, const int j)",
        f"{{ return less(a, b) || (!less(b, a) && i {'>' if last else '<'} j); }};",
        f"{kind} bound = 0; int limit = 0;",
        f"for (int place = 0; place < {k}; ++place) {{",
        f"{kind} best = 0; int found = -1;",
        f"for (int at = 0; at < {rows.length}; ++at) {{",
        f"const {kind} a = wide(in0[{rows.at(0, 'at')}]);",
        "if (place && !before(bound, limit, a, at)) continue;",
        "if (found < 0 || before(a, at, best, found)) { best = a; found = at; }",
        "}",
        *([f"out0[{rows.at(1, 'place')}] = in0[{rows.at(0, 'found')}];"] if values is not None else []),
        f"out{len(outs) - 1}[{rows.at(len(outs), 'place')}] = found;",
        "bound = best; limit = found;",
        "}",
    ]
    return rows.source("top_k", body)


def cumulative(x: Operand, out: Operand, axis: int, exclusive: bool, reverse: bool) -> Source:
    """Running sums along `axis`."""
    rows = _Rows(x, [out], axis)
    kind = computed(x.dtype)
    if kind == "bool":
        raise Unsuited("sums of booleans")
    at = f"{rows.length - 1} - step" if reverse else "step"
    write = f"out0[{rows.at(1, 'at')}] = narrow(({kind})total, {stored(out.dtype)}());"
    add = f"total = total + wide(in0[{rows.at(0, 'at')}]);"
    body = [
        *rows.head(),
        f"{kind} total = 0;",
        f"for (int step = 0; step < {rows.length}; ++step) {{ const int at = {at};",
        *([write, add] if exclusive else [add, write]),
        "}",
    ]
    return rows.source("cum_sum", body)


class _Rows:
    """Rows along one axis of several arrays, one for a thread."""

    def __init__(self, x: Operand, outs: Sequence[Operand], axis: int) -> None:
        self._operands = [x, *outs]
        axis %= len(x.shape)
        self.length = x.shape[axis]
        if self.length > _MOST or any(len(out.shape) != len(x.shape) for out in outs):
            raise Unsuited("long rows")
        check_count(x.size)
        others = [i for i in range(len(x.shape)) if i != axis]
        self._along = [operand.strides[axis] for operand in self._operands]
        self._dims = merged(
            dims_of([x.shape[i] for i in others], [[o.strides[i] for i in others] for o in self._operands])
        )
        self._count = math.prod(dim.size for dim in self._dims)
        self._index = index_type([*self._dims, Dim(self.length, tuple(self._along))])

    def head(self) -> list[str]:
        """C++ that finds the thread's row."""
        lines = [f"const unsigned i = blockIdx.x * {BLOCK}u + threadIdx.x;", f"if (i >= {self._count}u) return;"]
        lines += coordinates(self._dims, "i", "c")
        bases = [offset(self._dims, n, "c", self._index) for n in range(len(self._operands))]
        return lines + [f"const {self._index} base{n} = {base};" for n, base in enumerate(bases)]

    def at(self, operand: int, place: str) -> str:
        """The offset of a place of the row."""
        return f"base{operand} + ({self._index}){place} * {self._along[operand]}"

    def source(self, kind: str, body: list[str]) -> Source:
        """The kernel."""
        x, *outs = self._operands
        parameters = [
            (f"const {stored(x.dtype)}* __restrict__ in0", 0),
            *((f"{stored(out.dtype)}* __restrict__ out{n}", -1 - n) for n, out in enumerate(outs)),
        ]
        return source(kind, parameters, body, -(-self._count // BLOCK), BLOCK)
