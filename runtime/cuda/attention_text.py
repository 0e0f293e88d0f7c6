"""CUDA C++ for attention that a library does not take: one kernel, any shape, strides, dtype, mask and cap.

A block of 256 threads holds up to 64 rows: queries of the heads that share a head of k and v. It walks over the keys in
tiles, with the online softmax of Milakov and Gimelshein (2018), in float32 (float64 for float64). Where there are few
rows the keys are split between blocks, and a second kernel merges what they found (Flash-Decoding, Dao et al., 2023).
No GPU is needed here: tests run the text on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.codegen.operand import Operand, Source, Unsuited, computed, stored
from onnxmesh.runtime.dtypes import dtype

THREADS = 256
MERGE_THREADS = 128
INPUTS = ("q", "k", "v", "mask", "q_pos", "k_pos")
OUTPUTS = ("o", "m", "l", "scratch")
_WIDEST = 1024
"""The most values per head: they are summed in registers."""

PRELUDE = r"""
template <typename A> struct Limits;
template <> struct Limits<float> {
    static INLINE float infinity() { return bits_float(0x7f800000u); }
    static INLINE float most() { return bits_float(0x7f7fffffu); }
};
template <> struct Limits<double> {
    static INLINE double infinity() { return bits_double(0x7ff0000000000000ull); }
    static INLINE double most() { return bits_double(0x7fefffffffffffffull); }
};
template <typename O, typename A> INLINE O stored_as(A x) { return narrow((decltype(wide(O())))x, O()); }

template <class C, typename A> INLINE void write_row(
    int b, int head, int query, A highest, A total, typename C::S* m, typename C::S* l) {
    if (C::STATISTICS) {
        m[b * C::M_B + head * C::M_H + query * C::M_S] = stored_as<typename C::S>(highest);
        l[b * C::L_B + head * C::L_H + query * C::L_S] = stored_as<typename C::S>(total);
    }
}
template <class C, typename A> INLINE void write_value(
    int b, int head, int query, int e, A sum, A total, typename C::O* o) {
    A value = sum / (total == A(0) ? A(1) : total);
    if (C::NAN_IF_EMPTY && total == A(0)) value = Limits<A>::infinity() - Limits<A>::infinity();
    o[b * C::O_B + head * C::O_H + query * C::O_S + e * C::O_E] = stored_as<typename C::O>(value);
}

template <class C> INLINE void attend(
    const typename C::T* q, const typename C::T* k, const typename C::T* v, const typename C::MASK* mask,
    const int64* q_pos, const int64* k_pos, typename C::O* o, typename C::S* m, typename C::S* l,
    typename C::A* scratch) {
    typedef typename C::A A;
    constexpr int RM = C::RM, RN = C::RN, BM = 16 * RM, BN = 16 * RN, DK = C::DK;
    constexpr int GROUP = C::H / C::G, ROWS = GROUP * C::S_Q, TILES = (ROWS + BM - 1) / BM, EC = (C::E + 63) / 64 * 4;
    __shared__ A queries[DK][BM + 1], keys[DK][BN + 1], powers[BM][BN + 1], values[BN][64];
    __shared__ int seen;
    const A nothing = -Limits<A>::infinity(), hidden = C::UNIFORM ? -Limits<A>::most() : nothing;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int block = blockIdx.x;
    const int tile = block % TILES; block /= TILES;
    const int g = block % C::G; block /= C::G;
    const int b = block % C::B, split = block / C::B;
    const int first = split * C::SPAN, last = first + C::SPAN < C::S_K ? first + C::SPAN : C::S_K;

    A sum[RM][EC] = {}, highest[RM], total[RM];
    int head[RM], query[RM];
    bool here[RM];
    int64 position[RM] = {};
#pragma unroll
    for (int i = 0; i < RM; ++i) {
        const int row = tile * BM + ty + 16 * i;
        here[i] = row < ROWS;
        head[i] = g * GROUP + (here[i] ? row / C::S_Q : 0);
        query[i] = here[i] ? row % C::S_Q : 0;
        highest[i] = nothing;
        total[i] = A(0);
        if (C::POSITIONS) position[i] = q_pos[query[i] * C::QP_S];
    }
    for (int start = first; start < last; start += BN) {
        int64 key_position[RN] = {};
        if constexpr (C::POSITIONS) {
            bool any = C::UNIFORM;
#pragma unroll
            for (int n = 0; n < RN; ++n) {
                const int key = start + tx + 16 * n;
                if (key < last) key_position[n] = k_pos[key * C::KP_S];
#pragma unroll
                for (int i = 0; i < RM; ++i) any |= key < last && here[i] && key_position[n] <= position[i];
            }
            __syncthreads();
            if (threadIdx.x == 0) seen = 0;
            __syncthreads();
            if (any) seen = 1;
            __syncthreads();
            if (!seen) continue;
        }
        A score[RM][RN] = {};
        for (int d0 = 0; d0 < C::D; d0 += DK) {
            __syncthreads();
            for (int i = threadIdx.x; i < BM * DK; i += 256) {
                const int r = i / DK, row = tile * BM + r, d = d0 + i % DK;
                A x = A(0);
                if (row < ROWS && d < C::D)
                    x = wide(q[b * C::Q_B + (g * GROUP + row / C::S_Q) * C::Q_H + row % C::S_Q * C::Q_S + d * C::Q_D]);
                queries[i % DK][r] = x;
            }
            for (int i = threadIdx.x; i < BN * DK; i += 256) {
                const int n = i / DK, key = start + n, d = d0 + i % DK;
                A x = A(0);
                if (key < last && d < C::D) x = wide(k[b * C::K_B + g * C::K_H + key * C::K_S + d * C::K_D]);
                keys[i % DK][n] = x;
            }
            __syncthreads();
#pragma unroll 4
            for (int c = 0; c < DK; ++c) {
                A x[RM], y[RN];
#pragma unroll
                for (int i = 0; i < RM; ++i) x[i] = queries[c][ty + 16 * i];
#pragma unroll
                for (int n = 0; n < RN; ++n) y[n] = keys[c][tx + 16 * n];
#pragma unroll
                for (int i = 0; i < RM; ++i)
#pragma unroll
                    for (int n = 0; n < RN; ++n) score[i][n] += x[i] * y[n];
            }
        }
#pragma unroll
        for (int i = 0; i < RM; ++i) {
            A top = nothing;
#pragma unroll
            for (int n = 0; n < RN; ++n) {
                const int key = start + tx + 16 * n;
                A x = score[i][n] * A(C::SCALE);
                if (C::CAPPED) x = A(C::SOFTCAP) * m::tanh(x / A(C::SOFTCAP));
                x = wide(stored_as<typename C::ROUNDED>(x));
                if (C::MASKED && here[i] && key < last) {
                    const typename C::MASK given =
                        mask[b * C::MASK_B + head[i] * C::MASK_H + query[i] * C::MASK_S + key * C::MASK_T];
                    if constexpr (C::ADDITIVE) x += A(wide(given));
                    else x = given ? x : hidden;
                }
                if (C::POSITIONS && key_position[n] > position[i]) x = hidden;
                if (key >= last) x = nothing;
                score[i][n] = x;
                top = Maximum()(top, x);
            }
#pragma unroll
            for (int step = 8; step; step /= 2) top = Maximum()(top, __shfl_xor_sync(0xffffffffu, top, step));
            const A next = Maximum()(highest[i], top), reference = next == nothing ? A(0) : next;
            const A decay = m::exp(highest[i] - reference);
            highest[i] = next;
            total[i] *= decay;
#pragma unroll
            for (int c = 0; c < EC; ++c) sum[i][c] *= decay;
#pragma unroll
            for (int n = 0; n < RN; ++n) {
                const A power = m::exp(score[i][n] - reference);
                total[i] += power;
                powers[ty + 16 * i][tx + 16 * n] = power;
            }
        }
#pragma unroll
        for (int c = 0; c < EC; c += 4) {
            __syncthreads();
            for (int i = threadIdx.x; i < BN * 64; i += 256) {
                const int key = start + i / 64, e = 16 * c + i % 64;
                A x = A(0);
                if (key < last && e < C::E) x = wide(v[b * C::V_B + g * C::V_H + key * C::V_S + e * C::V_E]);
                values[i / 64][i % 64] = x;
            }
            __syncthreads();
#pragma unroll 4
            for (int n = 0; n < BN; ++n) {
                A y[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) y[j] = values[n][tx + 16 * j];
#pragma unroll
                for (int i = 0; i < RM; ++i) {
                    const A power = powers[ty + 16 * i][n];
#pragma unroll
                    for (int j = 0; j < 4; ++j) sum[i][c + j] += power * y[j];
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < RM; ++i) {
#pragma unroll
        for (int step = 8; step; step /= 2) total[i] += __shfl_xor_sync(0xffffffffu, total[i], step);
        if (!here[i]) continue;
        if constexpr (C::SPLITS == 1) {
            if (tx == 0) write_row<C>(b, head[i], query[i], highest[i], total[i], m, l);
#pragma unroll
            for (int c = 0; c < EC; ++c)
                if (16 * c + tx < C::E)
                    write_value<C>(b, head[i], query[i], 16 * c + tx, sum[i][c], total[i], o);
        } else {
            A* const row = scratch + (((int64)split * C::B + b) * C::H + head[i]) * C::S_Q * (C::E + 2)
                           + (int64)query[i] * (C::E + 2);
            if (tx == 0) { row[0] = highest[i]; row[1] = total[i]; }
#pragma unroll
            for (int c = 0; c < EC; ++c)
                if (16 * c + tx < C::E) row[2 + 16 * c + tx] = sum[i][c];
        }
    }
}

template <class C> INLINE void merge(
    typename C::O* o, typename C::S* m, typename C::S* l, const typename C::A* scratch) {
    typedef typename C::A A;
    const int query = blockIdx.x % C::S_Q, head = blockIdx.x / C::S_Q % C::H, b = blockIdx.x / C::S_Q / C::H;
    const int64 step = (int64)C::B * C::H * C::S_Q * (C::E + 2);
    const A* const row = scratch + (int64)blockIdx.x * (C::E + 2);
    A highest = -Limits<A>::infinity(), total = A(0);
    for (int i = 0; i < C::SPLITS; ++i) highest = Maximum()(highest, row[i * step]);
    const A reference = highest == -Limits<A>::infinity() ? A(0) : highest;
    for (int i = 0; i < C::SPLITS; ++i) total += row[i * step + 1] * m::exp(row[i * step] - reference);
    if (threadIdx.x == 0) write_row<C>(b, head, query, highest, total, m, l);
    for (int e = threadIdx.x; e < C::E; e += blockDim.x) {
        A sum = A(0);
        for (int i = 0; i < C::SPLITS; ++i) sum += row[i * step + 2 + e] * m::exp(row[i * step] - reference);
        write_value<C>(b, head, query, e, sum, total, o);
    }
}
"""


@dataclass(frozen=True)
class Attention:
    """One attention: its operands by the names INPUTS and OUTPUTS, and its attributes."""

    operands: Mapping[str, Operand]
    attrs: Mapping[str, Any]
    statistics: bool

    def sources(self, processors: int = 132) -> tuple[list[Source], int]:
        """The kernels, to be launched one after the other, and the bytes of scratch memory that they need.

        Their text follows on the prelude of the generated kernels and PRELUDE.
        Their arguments count as everywhere: inputs in the order INPUTS, outputs in the order OUTPUTS.

        Raises:
            Unsuited: dtypes differ or are not floats, or a head has more than 1024 values.
        """
        _check(self.operands)
        shape = _shape(self.operands)
        tiling = _tiling(shape, computed(self.operands["q"].dtype), processors)
        lines = _constants(self, shape, tiling)
        o, m = self.operands["o"], self.operands.get("m", self.operands["o"])
        types = {"T": stored(self.operands["q"].dtype), "A": computed(self.operands["q"].dtype)}
        types |= {"O": stored(o.dtype), "S": stored(m.dtype)}
        types["MASK"] = stored(self.operands["mask"].dtype) if "mask" in self.operands else "bool"
        types["ROUNDED"] = stored(dtype(self.attrs["qk_dtype"])) if self.attrs.get("qk_dtype") else types["A"]
        names = [f"typedef {kind} {name};" for name, kind in types.items()]
        case = f"Case{sha256(''.join((*names, *lines)).encode()).hexdigest()[:12]}"
        struct = f"struct {case} {{\n" + "\n".join((*names, *lines)) + "\n};\n"
        guard = f"#ifndef DEFINED_{case}\n#define DEFINED_{case}\n{struct}#endif\n"
        blocks = tiling["TILES"] * shape["G"] * shape["B"] * tiling["SPLITS"]
        kernels = [_kernel("attend", case, guard, types, (0, 1, 2, 3, 4, 5, -1, -2, -3, -4), blocks, THREADS)]
        if tiling["SPLITS"] == 1:
            return kernels, 0
        rows = shape["B"] * shape["H"] * shape["S_Q"]
        kernels.append(_kernel("merge", case, guard, types, (-1, -2, -3, -4), rows, MERGE_THREADS))
        size = 8 if types["A"] == "double" else 4
        return kernels, tiling["SPLITS"] * rows * (shape["E"] + 2) * size


def _kernel(
    kind: str, case: str, guard: str, types: Mapping[str, str], arguments: Sequence[int], grid: int, block: int
) -> Source:
    kinds = {"q": "T", "k": "T", "v": "T", "mask": "MASK", "o": "O", "m": "S", "l": "S", "scratch": "A"}
    names = [INPUTS[n] if n >= 0 else OUTPUTS[-1 - n] for n in arguments]
    head = ", ".join(
        f"{'const ' if n >= 0 else ''}{types[kinds[name]] if name in kinds else 'int64'}* {name}"
        for n, name in zip(arguments, names)
    )
    symbol = f"{kind}_{case[4:]}"
    body = f"    {kind}<{case}>({', '.join(names)});\n"
    code = f'{guard}extern "C" __global__ void __launch_bounds__({block}) {symbol}({head}) {{\n{body}}}\n'
    return Source(symbol, code, grid, block, tuple(arguments))


def _check(operands: Mapping[str, Operand]) -> None:
    q, v = operands["q"], operands["v"]
    if any(operands[name].dtype != q.dtype for name in ("k", "v")):
        raise Unsuited("q, k and v differ in dtype")
    if computed(q.dtype) not in ("float", "double") or v.shape[3] > _WIDEST:
        raise Unsuited("no floats, or too many values per head")
    for name in ("q_pos", "k_pos"):
        if name in operands and operands[name].dtype != np.int64:
            raise Unsuited("positions are not int64")
    if "mask" in operands and stored(operands["mask"].dtype) not in ("bool", "float", "double", "fp16", "bf16"):
        raise Unsuited("the mask is neither boolean nor float")


def _shape(operands: Mapping[str, Operand]) -> dict[str, int]:
    (b, h, s, d), (_, g, t, e) = operands["q"].shape, operands["v"].shape
    return {"B": b, "H": h, "G": g, "S_Q": s, "S_K": t, "D": d, "E": e}


def _tiling(shape: Mapping[str, int], kind: str, processors: int) -> dict[str, int]:
    """Rows and keys of a tile, 16 for every RM and RN, and how many blocks share the keys."""
    rows, t = shape["H"] // shape["G"] * shape["S_Q"], shape["S_K"]
    wide, above = kind == "double", shape["B"] * shape["G"]
    most = 4 if shape["E"] <= 128 and not wide else 2 if shape["E"] <= 256 else 1
    rm = next(n for n in (4, 2, 1) if n == 1 or (n <= most and -(-rows // (16 * n)) * above >= processors))
    rn = min(2 if wide else 4, max(1, -(-t // 16)))
    tiles = -(-rows // (16 * rm))
    splits = max(1, min(-(-2 * processors // (tiles * above)), t // (32 * rn))) if tiles * above < processors else 1
    span = -(-max(t, 1) // splits)
    span = -(-span // (16 * rn)) * 16 * rn
    return {
        "RM": rm,
        "RN": rn,
        "DK": 16 if rm > 1 or wide else 64 if rn > 1 else 128,
        "TILES": tiles,
        "SPAN": span,
        "SPLITS": max(1, -(-t // span)),
    }


def _constants(case: Attention, shape: Mapping[str, int], tiling: Mapping[str, int]) -> list[str]:
    operands, attrs = case.operands, case.attrs
    b, h, s, t = (shape[name] for name in ("B", "H", "S_Q", "S_K"))
    whole = {"mask": (b, h, s, t)}
    steps = {"q": "BHSD", "k": "BHSD", "v": "BHSE", "o": "BHSE", "mask": "BHST", "m": "BHS", "l": "BHS"}
    lines = [f"static constexpr int {n} = {x};" for n, x in {**shape, **tiling}.items() if n != "TILES"]
    for name, dims in steps.items():
        strides: Sequence[int] = (0,) * len(dims)
        if name in operands:
            strides = operands[name].broadcast(whole.get(name, operands[name].shape))
        lines += [f"static constexpr int64 {name.upper()}_{dim} = {x};" for dim, x in zip(dims, strides)]
    for name, short in (("q_pos", "QP_S"), ("k_pos", "KP_S")):
        lines.append(f"static constexpr int64 {short} = {operands[name].strides[0] if name in operands else 0};")
    masked, masked_row = "mask" in operands, attrs.get("masked_row", "nan")
    flags = {
        "MASKED": masked,
        "ADDITIVE": masked and operands["mask"].dtype != np.bool_,
        "POSITIONS": "q_pos" in operands and "k_pos" in operands,
        "STATISTICS": case.statistics,
        "UNIFORM": masked_row == "uniform",
        "NAN_IF_EMPTY": not case.statistics and masked_row != "zero",
        "CAPPED": bool(attrs.get("softcap")),
    }
    lines += [f"static constexpr bool {name} = {str(bool(x)).lower()};" for name, x in flags.items()]
    scale = attrs["scale"] if attrs.get("scale") is not None else 1 / math.sqrt(shape["D"])
    numbers = {"SCALE": float(scale), "SOFTCAP": float(attrs.get("softcap") or 1.0)}
    lines += [f"static constexpr double {name} = {x!r};" for name, x in numbers.items()]
    return lines
