"""Cases of kernels that work on rows, move data, or follow indices (see codegen_cases.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from codegen_cases import LAYOUTS, Case, Laid, Make, case, laid

from onnxmesh.runtime.dtypes import dtype

LENGTHS = (1, 3, 64, 80, 128, 515, 3072, 4104)


def norms() -> Iterator[Case]:
    """Norms and softmax over rows of all lengths and layouts."""
    make = Make(3)
    for kind in ("float32", "bfloat16", "float16", "float64"):
        for n in LENGTHS:
            rows = 2 if n > 256 else 37
            x, scale, bias = make(kind, rows, n), make(kind, n), make(kind, n)
            if kind in ("float32", "bfloat16") or n in (3, 128):
                if n > 1:
                    yield case("LayerNormalization", [x, scale, bias], epsilon=1e-5)
                yield case("RMSNormalization", [x, scale])
                yield case("Softmax", [x])
            if n in (64, 515):
                yield case("LogSoftmax", [x])
    for how in LAYOUTS:
        x = make("bfloat16", 3, 4, 64, how=how)
        yield case("LayerNormalization", [x, None, make("bfloat16", 64)], how=make.layout())
        yield case("RMSNormalization", [x, make("bfloat16", 4, 64)], axis=-1)
        yield case("Softmax", [x], how=make.layout())
        yield case("Softmax", [x], axis=1)
    yield case("LayerNormalization", [make("float32", 5, 4, 6), make("float32", 4, 6)], axis=1)
    yield case("RMSNormalization", [make("float32", 2, 20000), make("float32", 20000)])
    yield case("Softmax", [make("bfloat16", 1, 33000)])
    yield from hard_rows()


def hard_rows() -> Iterator[Case]:
    """Rows with NaN, infinities, and numbers far from 0."""
    for kind in ("float32", "bfloat16", "float16"):
        x = np.random.default_rng(0).standard_normal((6, 48)).astype(np.float32)
        x[0, 3], x[1, 5], x[2, 7], x[4], x[5] = np.nan, np.inf, -np.inf, -np.inf, x[5] * 100
        for op in ("Softmax", "LogSoftmax"):
            yield case(op, [laid(x.astype(dtype(kind)))])
    far = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32) + 30
    yield case("LayerNormalization", [laid(far)])
    yield case("LayerNormalization", [laid(far.astype(dtype("bfloat16")))])


def fused_norms() -> Iterator[Case]:
    """A gated residual, a norm, and a modulation, a cast or a Rotary."""
    make = Make(4)
    for kind in ("float32", "bfloat16"):
        for n in (64, 72, 1536):
            x, update = (make(kind, 2, 5, n, how=make.layout()) for _ in range(2))
            gate, scale, shift = (make(kind, 2, 1, n) for _ in range(3))
            types = [(dtype(kind), (2, 5, n))] * 2
            total = ["Add", 0, ["Mul", 1, 2]]
            norm = ["LayerNormalization", {"axis": -1, "epsilon": 1e-6}, total]
            expr = ["Add", ["Mul", norm, ["Add", 3, [kind, 1]]], 4]
            yield case("FusedNorm", [x, update, gate, scale, shift], types, expr=expr)
            yield case("FusedNorm", [x, update, gate, scale, shift], types[:1], how=make.layout(), expr=expr)
            wide = ["Cast", {"to": "float32"}, ["RMSNormalization", {"axis": -1}, ["Cast", {"to": kind}, 0], 1]]
            yield case("FusedNorm", [x, make(kind, n)], [(np.dtype("float32"), (2, 5, n))], expr=wide)
            again = ["Add", 0, ["RMSNormalization", {"axis": -1}, 0, 1]]
            yield case("FusedNorm", [x, make(kind, n)], expr=again)
            yield from _turned_norms(make, kind, n)


def _turned_norms(make: Make, kind: str, n: int) -> Iterator[Case]:
    for interleaved in (0, 1):
        for table in (n, n // 2):
            cos, sin = (make("float32", 5, 1, table) for _ in range(2))
            norm = ["RMSNormalization", {"axis": -1, "epsilon": 1e-6}, 0, 1]
            turned = ["Rotary", {"interleaved": interleaved}, norm, 2, 3]
            x = make(kind, 5, 3, n, how=make.layout())
            yield case("FusedNorm", [x, make(kind, n), cos, sin], how=make.layout(), expr=turned)


def rotaries() -> Iterator[Case]:
    """Rotary embeddings: pairs side by side or in halves, tables of d or d/2, alone and in expressions."""
    make = Make(5)
    for kind in ("float32", "bfloat16", "float16"):
        for d in (2, 6, 64, 128):
            for interleaved in (0, 1):
                for table in (d, d // 2):
                    x = make(kind, 2, 3, 7, d, how=make.layout())
                    cos, sin = make(kind, 7, table), make(kind, 2, 1, 7, table)
                    yield case("Rotary", [x, cos, sin], how=make.layout(), interleaved=interleaved)
                    rotary = ["Rotary", {"interleaved": interleaved}, ["Mul", 0, 3], 1, 2]
                    expr = ["Add", ["Mul", rotary, [kind, 0.5]], 0]
                    yield case("Fused", [x, cos, sin, make(kind, 3, 1, 1)], expr=expr)


def copies() -> Iterator[Case]:
    """Ops that move data, over dtypes and layouts."""
    make = Make(6)
    rng = make.rng
    for kind in ("bool", "bfloat16", "float32", "int64"):
        for perm in ((0, 2, 1, 3), (3, 1, 2, 0), (0, 1, 3, 2), (2, 0, 1, 3), (1, 3, 0, 2)):
            x = make(kind, 3, 17, 9, 16, how=make.layout())
            shape = tuple(x.shape[i] for i in perm)
            yield case("Transpose", [x], [(x.buffer.dtype, shape)], how=make.layout(), perm=list(perm))
        x = make(kind, 70, 130)
        yield case("Transpose", [x], [(x.buffer.dtype, (130, 70))], perm=[1, 0])
        for how in LAYOUTS:
            yield case("Identity", [make(kind, 4, 6, 32, how=how)], how=make.layout())
            pieces = [make(kind, 3, int(n), 8, how=make.layout()) for n in rng.integers(0, 5, 4)]
            total = sum(p.shape[1] for p in pieces)
            yield case("Concat", pieces, [(dtype(kind), (3, total, 8))], how=how, axis=-2)
            sizes = [(dtype(kind), (3, int(n), 8)) for n in (4, 2, 1, 4)]
            yield case("Split", [make(kind, 3, 11, 8, how=how)], sizes, how=make.layout(), axis=1)
            x = make(kind, 5, 8, 24, how=how)
            bounds: dict[str, Any] = {"axes": [0, 2], "starts": [4, 3], "steps": [-2, 5]}
            yield case("Slice", [x], [(dtype(kind), (3, 8, 4))], how=make.layout(), **bounds)
            yield case("Reshape", [x], [(dtype(kind), (40, 4, 6))])
            yield case("Reshape", [make(kind, 10, 4, 24)], [(dtype(kind), (5, 8, 24))], how=how)
            yield case("Reshape", [x], [(dtype(kind), (5, 2, 4, 1, 24))], how=make.layout())
            yield case("Expand", [make(kind, 4, 1, 8, how=how)], [(dtype(kind), (2, 4, 3, 8))])
            yield case("Expand", [make(kind, 4, 1)], [(dtype(kind), (4, 48))], how=how)
            yield case("Tile", [make(kind, 2, 3, how=how)], [(dtype(kind), (4, 9))], how=make.layout(), repeats=[2, 3])
            pads = [1, 0, 2, 0, 3, -1]
            yield case("Pad", [make(kind, 2, 3, 8, how=how), make(kind)], [(dtype(kind), (3, 6, 9))], pads=pads)
            yield case("Pad", [make(kind, 2, 3, 8)], [(dtype(kind), (3, 6, 9))], how=how, pads=pads)
            segments: dict[str, Any] = {"dim": 1, "segments": [2, 2, 4, 1, 8, 1], "axis": "cp"}
            yield case(
                "Shard", [make(kind, 3, 14, 4, how=how)], [(dtype(kind), (3, 8, 4))], coordinate={"cp": 1}, **segments
            )
            yield case("Trilu", [make(kind, 2, 8, 16, how=how)], how=make.layout(), k=2, upper=int(rng.integers(2)))


def indexed() -> Iterator[Case]:
    """Gather and GatherElements."""
    make = Make(7)
    rng = make.rng
    for kind in ("bfloat16", "float32", "bool", "int64"):
        for how in LAYOUTS:
            data = make(kind, 6, 7, 16, how=how)
            for axis, index in ((0, "int64"), (1, "int32"), (2, "int64")):
                n = data.shape[axis]
                ids = laid(rng.integers(-n, n, (2, 3)).astype(index), make.layout())
                shape = (*data.shape[:axis], 2, 3, *data.shape[axis + 1 :])
                yield case("Gather", [data, ids], [(dtype(kind), shape)], how=make.layout(), axis=axis)
                whole = laid(rng.integers(-n, n, data.shape).astype(index), make.layout())
                yield case("GatherElements", [data, whole], axis=axis)
    scalar = laid(np.array(-2, np.int64))
    yield case("Gather", [make("float32", 5, 8), scalar], [(np.dtype("float32"), (8,))])


def reductions() -> Iterator[Case]:
    """Sums and the like over inner, outer and scattered dims."""
    make = Make(8)
    ops = "Sum Mean Max Min Prod L1 L2 SumSquare".split()
    for kind in ("float32", "bfloat16", "float64", "int32", "int64"):
        for op in ops:
            if op in ("Mean", "L2", "Prod") and dtype(kind).kind == "i":
                continue
            for axes in ([2], [0], [0, 1], [1], [0, 2]) if op in ("Sum", "Max") else ([1, 2], [0]):
                x = make(kind, 5, 6, 72, how=make.layout(), positive=op == "Prod")
                if op == "Prod":
                    x = laid((x.values * dtype(kind).type(0.1) + dtype(kind).type(0.95)).astype(dtype(kind)))
                shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
                yield case(f"Reduce{op}", [x], [(dtype(kind), shape)], how=make.layout(), axes=axes)
                shape = tuple(n for i, n in enumerate(x.shape) if i not in axes)
                yield case(f"Reduce{op}", [x], [(dtype(kind), shape)], axes=axes, keepdims=0)
    for kind in ("uint8", "int8", "int16"):  # shuffles widen them
        for op in ("Max", "Min"):
            yield case(f"Reduce{op}", [make(kind, 3, 72)], [(dtype(kind), (3, 1))], axes=[1])
    yield case("ReduceSumSquare", [make("uint32", 3, 72)], [(dtype("uint64"), (3, 1))], axes=[1])
    yield case("ReduceSum", [make("float32", 4100)], [(np.dtype("float32"), ())], axes=[0], keepdims=0)
    yield case("ReduceLogSum", [make("float32", 3, 50, positive=True)], [(np.dtype("float32"), (3, 1))], axes=[1])


def merges() -> Iterator[Case]:
    """Two blocks of attention merged, with rows that see no key in one or both; then finished."""
    make = Make(9)
    for kind in ("bfloat16", "float32"):
        for how in LAYOUTS:
            ins = [x for part in range(2) for x in _block(make, kind, part)]
            types = [(dtype(kind), (2, 3, 5, 64)), *[(np.dtype("float32"), (2, 3, 5, 1))] * 2]
            yield case("AttentionMerge", ins, types, how=how)
        o, _, total = _block(make, kind, 0)
        for row in ("nan", "zero", "uniform"):
            yield case("AttentionFinish", [o, total], masked_row=row)


def _block(make: Make, kind: str, part: int) -> list[Laid]:
    o = make(kind, 2, 3, 5, 64, how=make.layout())
    m, l = (make("float32", 2, 3, 5, 1, positive=True).values.copy() for _ in range(2))
    for empty in ((0, 0, part), (1, 1, 4)):
        m[empty], l[empty] = -np.inf, 0
        o.values[empty] = 0
    return [o, laid(m), laid(l)]


def selections() -> Iterator[Case]:
    """TopK, ArgMax, ArgMin and CumSum, with equal entries and NaN."""
    make = Make(10)
    for kind in ("float32", "bfloat16", "int64"):
        for how in LAYOUTS:
            x = make(kind, 3, 9, 5, how=how)
            x.values[0, 2] = x.values[0, 7] = x.values[0, 8]
            if kind != "int64":
                x.values[1, 3, 1] = x.values[1, 5, 1] = np.nan
            for largest in (0, 1):
                types = [(dtype(kind), (3, 4, 5)), (np.dtype("int64"), (3, 4, 5))]
                yield case("TopK", [x], types, how=make.layout(), axis=1, k=4, largest=largest)
            for op in ("ArgMax", "ArgMin"):
                last = int(make.rng.integers(2))
                if last and kind != "int64":
                    x = make(kind, 3, 9, 5, how=how)
                yield case(op, [x], [(np.dtype("int64"), (3, 5))], axis=1, keepdims=0, select_last_index=last)
                yield case(op, [x], [(np.dtype("int64"), (1, 9, 5))], select_last_index=last)
            x = make(kind, 3, 9, 5, how=how)
            yield case("CumSum", [x], how=make.layout(), axis=-2, exclusive=int(make.rng.integers(2)))
            yield case("CumSum", [x], axis=2, reverse=1)
