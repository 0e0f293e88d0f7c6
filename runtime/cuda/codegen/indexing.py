"""Kernels that read where an index tensor or the position says: Gather, GatherElements, Trilu."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

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


def gather(data: Operand, indices: Operand, out: Operand, axis: int) -> Source:
    """`data` with dim `axis` replaced by the dims of `indices`; indices beyond the ends count as the ends."""
    axis %= len(data.shape)
    before, after = axis, len(data.shape) - axis - 1
    reads = (*data.strides[:axis], *[0] * len(indices.shape), *data.strides[axis + 1 :])
    chooses = (*[0] * before, *indices.strides, *[0] * after)
    return _gathered("gather", data, axis, indices, out, reads, chooses)


def gather_elements(data: Operand, indices: Operand, out: Operand, axis: int) -> Source:
    """out[i, j, k] = data[indices[i, j, k], j, k] for `axis` 0; indices beyond the ends count as the ends."""
    axis %= len(data.shape)
    reads = tuple(0 if i == axis else stride for i, stride in enumerate(data.strides))
    return _gathered("gather_elements", data, axis, indices, out, reads, indices.strides)


def _gathered(
    kind: str, data: Operand, axis: int, indices: Operand, out: Operand, reads: Sequence[int], chooses: Sequence[int]
) -> Source:
    check_count(out.size)
    if indices.dtype.kind not in "iu":
        raise Unsuited("indices that are not integers")
    data, out = _bits(data), _bits(out)
    dims = merged(dims_of(out.shape, [reads, chooses, out.strides]))
    inner = dims[-1] if dims else Dim(1, (0, 0, 0))
    along = inner.strides[1] == 0
    width = vector(inner.size, (inner.strides[0], inner.strides[2]), (data, out)) if along else 1
    walked = merged([*dims[:-1], Dim(inner.size // width, tuple(s * width for s in inner.strides))])
    index = index_type([*walked, Dim(data.shape[axis], (data.strides[axis], 0, 0)), inner])
    count, size = math.prod(d.size for d in walked), data.shape[axis]
    body = [
        f"const unsigned i = blockIdx.x * {BLOCK}u + threadIdx.x;",
        f"if (i >= {count}u) return;",
        *coordinates(walked, "i", "c"),
        f"int64 at = in1[{offset(walked, 1, 'c', index)}];",
        f"at = at < 0 ? at + {size} : at;",
        f"at = at < 0 ? 0 : at < {size} ? at : {size - 1};",
    ]
    steps = [tuple(e * inner.strides[n] for e in range(width)) for n in range(3)]
    jumps = Dim(size, (data.strides[axis], 0, 0))
    base = f"{offset(walked, 0, 'c', index)} + ({index})at * {data.strides[axis]}"
    reading = Access(data, "in0", base, steps[0], alignment(data, [*walked, jumps], 0))
    body += reading.load("v")
    writing = Access(out, "out0", offset(walked, 2, "c", index), steps[2], alignment(out, walked, 2))
    body += writing.store("v", reading.width)
    parameters = [
        (f"const {stored(data.dtype)}* __restrict__ in0", 0),
        (f"const {stored(indices.dtype)}* __restrict__ in1", 1),
        (f"{stored(out.dtype)}* __restrict__ out0", -1),
    ]
    return source(kind, parameters, body, -(-count // BLOCK), BLOCK)


def trilu(x: Operand, out: Operand, k: int, upper: bool) -> Source:
    """The upper or lower triangle of the last two dims from diagonal `k`; the rest is 0."""
    check_count(out.size)
    x, out = _bits(x), _bits(out)
    *outer, row, column = dims_of(out.shape, [x.strides, out.strides])
    width = vector(column.size, column.strides, (x, out))
    dims = [*merged(outer), row, Dim(column.size // width, tuple(s * width for s in column.strides))]
    index, count = index_type([*dims, column]), math.prod(d.size for d in dims)
    steps = [tuple(e * column.strides[n] for e in range(width)) for n in range(2)]
    r, c = f"c{len(dims) - 2}", f"c{len(dims) - 1}"
    body = [
        f"const unsigned i = blockIdx.x * {BLOCK}u + threadIdx.x;",
        f"if (i >= {count}u) return;",
        *coordinates(dims, "i", "c"),
        f"{stored(x.dtype)} y[{width}];",
    ]
    reading = Access(x, "in0", offset(dims, 0, "c", index), steps[0], alignment(x, dims, 0))
    body += reading.load("v")
    taken = "v[e]" if reading.width > 1 else "v[0]"
    keep = f"(int64){c} * {width} + e - (int64){r} {'>=' if upper else '<='} {k}"
    body.append(f"for (int e = 0; e < {width}; ++e) y[e] = {keep} ? {taken} : {stored(x.dtype)}(0);")
    body += Access(out, "out0", offset(dims, 1, "c", index), steps[1], alignment(out, dims, 1)).store("y", width)
    parameters = [(f"const {stored(x.dtype)}* __restrict__ in0", 0), (f"{stored(out.dtype)}* __restrict__ out0", -1)]
    return source("trilu", parameters, body, -(-count // BLOCK), BLOCK)


def _bits(x: Operand) -> Operand:
    """The operand with unsigned integers in place of its elements."""
    if x.itemsize not in (1, 2, 4, 8):
        raise Unsuited(f"elements of {x.itemsize} bytes")
    return Operand(np.dtype(f"u{x.itemsize}"), x.shape, x.strides, x.alignment)
