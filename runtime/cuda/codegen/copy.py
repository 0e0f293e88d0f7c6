"""Copies between arrays of any strides, several in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxmesh.runtime.cuda.codegen import compiling
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
    power_of_two,
)
from onnxmesh.runtime.cuda.codegen.view import View
from onnxmesh.runtime.cuda.launchers import Launch
from onnxmesh.runtime.kernels.registry import Array

BLOCK = 256
_LEAST_TILED = 8
"""Dims shorter than that are not worth a transpose through shared memory."""
_MOST_PAIRS = 64
"""Of one launch: their addresses are parameters of the kernel."""


def strided_copy(pairs: Sequence[tuple[Array, Array]]) -> Launch:
    """A launch that copies every source into its destination: one kernel for up to 64 pairs.

    Args:
        pairs: (source, destination): CuPy arrays of equal shape and dtype and of any strides, 0 and negative ones in
            the source included. Shapes may differ from pair to pair. No destination may overlap any other array.

    Raises:
        Unsuited: shapes or sizes of elements differ, elements are not aligned or not of 1, 2, 4 or 8 bytes.
    """
    return copy_views([(View.of(source), View.of(target)) for source, target in pairs])


def copy_views(pairs: Sequence[tuple[View | None, View]]) -> Launch:
    """As `strided_copy`; a source None means zeros."""
    if any(a is not None and (a.itemsize, a.shape) != (b.itemsize, b.shape) for a, b in pairs):
        raise Unsuited("a copy between different types")
    wanted = [(a, b) for a, b in pairs if math.prod(b.shape)]
    launches = []
    for start in range(0, len(wanted), _MOST_PAIRS):
        part = wanted[start : start + _MOST_PAIRS]
        kernel = copies([(None if a is None else a.operand, b.operand) for a, b in part])
        ends = [(a.address if a is not None else 0, b.address) for a, b in part]
        launches.append(
            compiling.enqueue(kernel, [ends[n][0] if n >= 0 else ends[-1 - n][1] for n in kernel.arguments])
        )
    if len(launches) == 1:
        return launches[0]

    def launch(stream: int) -> None:
        for one in launches:
            one(stream)

    return launch


def copies(pairs: Sequence[tuple[Operand | None, Operand]]) -> Source:
    """The kernel that copies pairs. Those of equal layout share their code."""
    layouts: dict[_Layout, list[int]] = {}
    for number, (a, b) in enumerate(pairs):
        layouts.setdefault(_layout(a, b), []).append(number)
    body, start = [], 0
    for layout, numbers in layouts.items():
        stop = start + layout.blocks * len(numbers)
        body += [
            f"if (blockIdx.x >= {start}u && blockIdx.x < {stop}u) {{",
            *_part(layout, numbers, start),
            "return;",
            "}",
        ]
        start = stop
    parameters = []
    for number, (a, b) in enumerate(pairs):
        kind = stored(b.dtype)
        parameters += [(f"const {kind}* __restrict__ in{number}", number)] if a is not None else []
        parameters.append((f"{kind}* __restrict__ out{number}", -1 - number))
    return source("copy", parameters, body, start, BLOCK)


@dataclass(frozen=True)
class _Layout:
    """How a pair is copied.

    Attributes:
        dims: what blocks and threads walk over, with strides of source and destination.
        tile: where memory order changes, the side of the square that goes through shared memory; else 0. The last two
            dims are then the source's and the destination's innermost.
        width: else, elements of a thread along the dim `inner`.
    """

    source: Operand | None
    target: Operand
    dims: tuple[Dim, ...]
    inner: Dim
    width: int
    tile: int

    @property
    def blocks(self) -> int:
        """Blocks of one pair."""
        if self.tile:
            *outer, j, i = self.dims
            return math.prod(d.size for d in outer) * -(-j.size // self.tile) * -(-i.size // self.tile)
        return -(-math.prod(d.size for d in self.dims) // BLOCK)


def _layout(a: Operand | None, b: Operand) -> _Layout:
    reads = (0,) * len(b.shape) if a is None else a.broadcast(b.shape)
    order = sorted(range(len(b.shape)), key=lambda i: (-abs(b.strides[i]), -abs(reads[i])))
    strides = [[s[i] for i in order] for s in (reads, b.strides)]
    dims = merged(dims_of([b.shape[i] for i in order], strides))
    plain = b.viewed((), ())  # only dtype and alignment count from here on
    first = None if a is None else a.viewed((), ())
    inner = dims[-1] if dims else Dim(1, (0, 0))
    if inner.strides[1] == 1 and abs(inner.strides[0]) > 1 and inner.size >= _LEAST_TILED:
        along = next((d for d in dims[:-1] if d.strides[0] == 1 and d.size >= _LEAST_TILED), None)
        if along is not None:
            outer = [d for d in dims[:-1] if d is not along]
            return _Layout(first, plain, (*outer, along, inner), inner, 1, 64 if b.itemsize <= 2 else 32)
    width = 1
    if inner.strides[1] == 1 and inner.strides[0] in (0, 1):
        width = power_of_two(inner.size, max(1, 16 // b.itemsize))
        ends = [(b, 1), *([(a, 0)] if a is not None and inner.strides[0] == 1 else [])]
        width = min([width, *(alignment(x, dims[:-1], n) // b.itemsize for x, n in ends)])
    pieces = Dim(inner.size // width, tuple(s * width for s in inner.strides))
    walked = tuple(merged([*dims[:-1], pieces]))
    check_count(math.prod(dim.size for dim in walked))
    return _Layout(first, plain, walked, inner, width, 0)


def _part(layout: _Layout, numbers: Sequence[int], start: int) -> list[str]:
    """C++ of the blocks from `start` on, which copy the pairs `numbers`."""
    kind = stored(layout.target.dtype)
    lines = [
        f"const unsigned block = (blockIdx.x - {start}u) % {layout.blocks}u;",
        f"const unsigned pair = (blockIdx.x - {start}u) / {layout.blocks}u;",
        f"{kind}* to = {_choice('out', numbers)};",
    ]
    if layout.source is not None:
        lines.append(f"const {kind}* from = {_choice('in', numbers)};")
    return lines + (_tiled(layout) if layout.tile else _plain(layout))


def _choice(name: str, numbers: Sequence[int]) -> str:
    *others, last = numbers
    return "".join(f"pair == {i}u ? {name}{n} : " for i, n in enumerate(others)) + f"{name}{last}"


def _plain(layout: _Layout) -> list[str]:
    index, steps = index_type([*layout.dims, layout.inner]), layout.inner.strides
    count = math.prod(d.size for d in layout.dims)
    lines = [f"const unsigned i = block * {BLOCK}u + threadIdx.x;", f"if (i >= {count}u) return;"]
    lines += coordinates(layout.dims, "i", "c")

    def access(operand: Operand, number: int, pointer: str) -> Access:
        offsets = tuple(e * steps[number] for e in range(layout.width))
        aligned = alignment(operand, layout.dims, number)
        return Access(operand, pointer, offset(layout.dims, number, "c", index), offsets, aligned)

    if layout.source is None:
        lines.append(f"const {stored(layout.target.dtype)} v[1] = {{0}};")
        width = 1
    else:
        reading = access(layout.source, 0, "from")
        lines += reading.load("v")
        width = reading.width
    return lines + access(layout.target, 1, "to").store("v", width)


def _tiled(layout: _Layout) -> list[str]:
    """A square of `tile` by `tile` elements: read along the source's innermost dim, written along the other's."""
    *outer, j, i = layout.dims
    side, kind = layout.tile, stored(layout.target.dtype)
    index = index_type(layout.dims)
    across, down = -(-i.size // side), -(-j.size // side)
    long = "ll" if index == "int64" else ""
    lines = [
        f"const unsigned i0 = block % {across}u * {side}u;",
        f"const unsigned j0 = block / {across}u % {down}u * {side}u;",
        f"const unsigned rest = block / {across * down}u;",
        *coordinates(outer, "rest", "c"),
        f"from += {offset(outer, 0, 'c', index)};",
        f"to += {offset(outer, 1, 'c', index)};",
        f"__shared__ {kind} tile[{side}][{side + 1}];",
        f"const unsigned x = threadIdx.x % {side}u, y = threadIdx.x / {side}u;",
        "#pragma unroll",
        f"for (unsigned k = y; k < {side}u; k += {BLOCK // side}u)",
        f"if (j0 + x < {j.size}u && i0 + k < {i.size}u)",
        f"tile[k][x] = from[({index})(j0 + x) + ({index})(i0 + k) * {i.strides[0]}{long}];",
        "__syncthreads();",
        "#pragma unroll",
        f"for (unsigned k = y; k < {side}u; k += {BLOCK // side}u)",
        f"if (i0 + x < {i.size}u && j0 + k < {j.size}u)",
        f"to[({index})(i0 + x) + ({index})(j0 + k) * {j.strides[1]}{long}] = tile[x][k];",
    ]
    return lines
