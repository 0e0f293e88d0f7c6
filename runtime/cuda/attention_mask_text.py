"""CUDA C++ for what stands around cuDNN's attention: its bias before it, rows that see no key after it.

A bias has three levels, far apart and finite, so that no difference of infinities arises. What a mask adds is raised to
`LOWEST`. Where masked rows are uniform, a hidden key has `HIDDEN`, and so has one to which a mask adds float32's lowest
number. `NEVER` stands for minus infinity: that of a mask, and of hidden keys where masked rows are not uniform. A row's
log-sum-exp says which of these is its highest. Where it is below `LOWEST` the row sees no key: it is the mean over its
keys of level `HIDDEN`, those that cuDNN was not given included, or has no keys at all.
No GPU is needed here: tests run the text on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from onnxmesh.runtime.cuda.codegen.operand import Operand, Source, stored
from onnxmesh.runtime.cuda.visibility import Run

BIAS_THREADS, FINISH_THREADS = 256, 128
PER_THREAD = 8
"""Elements of a bias that a thread writes; its rows are padded to a multiple."""

PRELUDE = r"""
constexpr float LOWEST = -1e30f, HIDDEN = -2e30f, NEVER = -4e30f;
constexpr float NONE_SEEN = -1.5e30f, NONE_AT_ALL = -3e30f;  // between the levels

template <class C> INLINE bool is_even(const typename C::BIAS* bias, int b, int head, int row, int key) {
    const int seen = C::KEYS - (C::CAUSAL ? C::ROWS - 1 - (row - C::FIRST) : 0);
    if (!C::BIASED || key >= seen) return true;  // hidden by its position
    return (float)wide(bias[b * C::BIAS_B + head * C::BIAS_H + row * C::BIAS_S + key]) > NONE_AT_ALL;
}

template <class C> INLINE void make_bias(
    const typename C::MASK* mask, const int64* q_pos, const int64* k_pos, typename C::BIAS* bias) {
    const int64 at = ((int64)blockIdx.x * 256 + threadIdx.x) * 8;
    if (at >= (int64)C::B * C::H * C::ROWS * C::WIDTH) return;
    const int first = at % C::WIDTH, row = at / C::WIDTH % C::ROWS;
    const int head = at / C::WIDTH / C::ROWS % C::H, b = at / C::WIDTH / C::ROWS / C::H;
    const int64 position = C::POSITIONS ? q_pos[row * C::QP_S] : 0;
    const float hidden = C::UNIFORM ? HIDDEN : NEVER, most = bits_float(0x7f7fffffu);
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int key = first + j;
        float x = key < C::S_K ? 0.0f : NEVER;
        if (C::MASKED && key < C::S_K) {
            const typename C::MASK given = mask[b * C::MASK_B + head * C::MASK_H + row * C::MASK_S + key * C::MASK_T];
            if constexpr (C::ADDITIVE) {
                x = (float)wide(given);
                if (x < LOWEST) x = x - x != 0.0f ? NEVER : C::UNIFORM && x == -most ? HIDDEN : LOWEST;
            } else {
                x = given ? 0.0f : hidden;
            }
        }
        if (C::POSITIONS && key < C::S_K && k_pos[key * C::KP_S] > position) x = hidden;
        values[j] = x;
    }
    put(bias + at, values);
}

template <class C> INLINE void finish(
    const typename C::T* v, const typename C::BIAS* bias, typename C::T* o, float* m, float* l,
    const float* log_sum_exp) {
    enum { SEES = -1, EMPTY = 0 };  // else the number of keys that a row is the mean of
    __shared__ int states[128];
    const int rows = C::B * C::H * C::ROWS, own = blockIdx.x * 128 + threadIdx.x;
    states[threadIdx.x] = SEES;
    if (own < rows) {
        const int row = C::FIRST + own % C::ROWS, head = own / C::ROWS % C::H, b = own / C::ROWS / C::H;
        const float x = C::KEYS ? log_sum_exp[own] : NEVER;
        int state = x < NONE_SEEN ? EMPTY : SEES;
        if (C::UNIFORM && state == EMPTY)
            for (int key = 0; key < C::S_K; ++key) state += is_even<C>(bias, b, head, row, key);
        states[threadIdx.x] = state;
        if (C::STATISTICS) {
            const float most = bits_float(0x7f7fffffu), infinity = bits_float(0x7f800000u);
            m[b * C::M_B + head * C::M_H + row * C::M_S] = state == SEES ? x : state ? -most : -infinity;
            l[b * C::L_B + head * C::L_H + row * C::L_S] = state == SEES ? 1.0f : (float)state;
        }
    }
    __syncthreads();
    for (int i = 0; i < 128; ++i) {
        if (states[i] == SEES) continue;
        const int at = blockIdx.x * 128 + i, row = C::FIRST + at % C::ROWS;
        const int head = at / C::ROWS % C::H, b = at / C::ROWS / C::H;
        for (int e = threadIdx.x; e < C::E; e += 128) {
            float x = C::NAN_IF_EMPTY ? bits_float(0x7fc00000u) : 0.0f;
            if (states[i] != EMPTY) {
                x = 0.0f;
                for (int key = 0; key < C::S_K; ++key)
                    if (is_even<C>(bias, b, head, row, key))
                        x += wide(v[b * C::V_B + head / (C::H / C::G) * C::V_H + key * C::V_S + e * C::V_E]);
                x /= states[i];
            }
            o[b * C::O_B + head * C::O_H + row * C::O_S + e * C::O_E] = narrow(x, typename C::T());
        }
    }
}
"""


@dataclass(frozen=True)
class Bias:
    """A bias [b, h, rows, width] of bfloat16 or float32, made of a mask and of positions where they are given.

    Attributes:
        shape: b, h and rows, each 1 where the bias is broadcast along it; and the number of keys.
        uniform: a key that is hidden, other than by an infinity that is added, has the lowest score; see above.
    """

    dtype: str
    shape: tuple[int, int, int, int]
    mask: Operand | None = None
    q_pos: Operand | None = None
    k_pos: Operand | None = None
    uniform: bool = False

    @property
    def width(self) -> int:
        """Elements of a row in memory."""
        return -(-self.shape[3] // PER_THREAD) * PER_THREAD

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.shape[0] * self.shape[1] * self.shape[2] * self.width * (2 if self.dtype == "bfloat16" else 4)

    @property
    def stored(self) -> str:
        """Its dtype as C++."""
        return "bf16" if self.dtype == "bfloat16" else "float"

    @property
    def strides(self) -> tuple[int, int, int]:
        """From batch entry to batch entry, from head to head and from row to row, in elements; 0 where it is one."""
        b, h, rows, _ = self.shape
        steps = (h * rows * self.width, rows * self.width, self.width)
        return steps[0] if b > 1 else 0, steps[1] if h > 1 else 0, steps[2] if rows > 1 else 0

    def source(self) -> Source:
        """The kernel that writes it; arguments: mask, q_pos, k_pos as inputs 3 to 5, and the bias as output 0."""
        b, h, rows, t = self.shape
        numbers = {"B": b, "H": h, "ROWS": rows, "WIDTH": self.width, "S_K": t}
        strides = self.mask.broadcast(self.shape) if self.mask is not None else (0, 0, 0, 0)
        numbers |= {f"MASK_{dim}": x for dim, x in zip("BHST", strides)}
        numbers |= {
            "QP_S": self.q_pos.strides[0] if self.q_pos else 0,
            "KP_S": self.k_pos.strides[0] if self.k_pos else 0,
        }
        flags = {
            "UNIFORM": self.uniform,
            "MASKED": self.mask is not None,
            "ADDITIVE": self.mask is not None and self.mask.dtype != np.bool_,
            "POSITIONS": self.q_pos is not None and self.k_pos is not None,
        }
        types = {"MASK": "bool" if self.mask is None else stored(self.mask.dtype)}
        types["BIAS"] = self.stored
        head = f"const {types['MASK']}* mask, const int64* q_pos, const int64* k_pos, {types['BIAS']}* bias"
        blocks = -(-b * h * rows * self.width // (BIAS_THREADS * PER_THREAD))
        return _source("make_bias", types, numbers, flags, head, blocks, BIAS_THREADS, (3, 4, 5, -1))


@dataclass(frozen=True)
class Finish:
    """What is done to the query rows of a run after cuDNN: statistics, and the value of rows that see no key.

    Attributes:
        operands: v, o and, with statistics, m and l.
        run: the rows, and the keys that cuDNN was given; without any it was not called.
        bias: what was added to the scores.
    """

    operands: Mapping[str, Operand]
    run: Run
    masked_row: str
    bias: Bias | None = None

    def source(self) -> Source:
        """The kernel; arguments: v and the bias as inputs 2 and 3; o, m, l and the log-sum-exp as outputs 0 to 3."""
        o, v = self.operands["o"], self.operands["v"]
        b, h, _, e = o.shape
        statistics = "m" in self.operands
        run, given = self.run, self.bias is not None
        numbers = {"B": b, "H": h, "G": v.shape[1], "S_K": v.shape[2], "E": e}
        numbers |= {"ROWS": run.rows, "FIRST": run.start, "KEYS": run.keys}
        numbers |= {f"BIAS_{dim}": x for dim, x in zip("BHS", self.bias.strides if self.bias else (0, 0, 0))}
        for name, dims in {"o": "BHSE", "v": "BHSE", "m": "BHS", "l": "BHS"}.items():
            strides = self.operands[name].strides if name in self.operands else (0, 0, 0)
            numbers |= {f"{name.upper()}_{dim}": x for dim, x in zip(dims, strides)}
        flags = {
            "STATISTICS": statistics,
            "CAUSAL": run.causal,
            "BIASED": given,
            "UNIFORM": self.masked_row == "uniform",
            "NAN_IF_EMPTY": not statistics and self.masked_row != "zero",
        }
        types = {"T": stored(o.dtype), "BIAS": self.bias.stored if self.bias else "float"}
        head = f"const {types['T']}* v, const {types['BIAS']}* bias, "
        head += f"{types['T']}* o, float* m, float* l, const float* log_sum_exp"
        blocks = -(-b * h * run.rows // FINISH_THREADS)
        return _source("finish", types, numbers, flags, head, blocks, FINISH_THREADS, (2, 3, -1, -2, -3, -4))


def _source(
    kind: str,
    types: Mapping[str, str],
    numbers: Mapping[str, int],
    flags: Mapping[str, bool],
    head: str,
    grid: int,
    block: int,
    arguments: tuple[int, ...],
) -> Source:
    lines = [f"typedef {x} {name};" for name, x in types.items()]
    strided = {name for name in numbers if "_" in name and name != "S_K"}
    lines += [f"static constexpr {'int64' if name in strided else 'int'} {name} = {x};" for name, x in numbers.items()]
    lines += [f"static constexpr bool {name} = {str(bool(x)).lower()};" for name, x in flags.items()]
    digest = sha256("\n".join((kind, *lines)).encode()).hexdigest()[:12]
    struct = "\n".join((f"struct Around{digest} {{", *lines, "};"))
    guard = f"#ifndef AROUND_{digest}\n#define AROUND_{digest}\n{struct}\n#endif\n"
    names = ", ".join(parameter.rpartition(" ")[2] for parameter in head.split(", "))
    symbol = f"{kind}_{digest}"
    body = f"    {kind}<Around{digest}>({names});\n"
    code = f'{guard}extern "C" __global__ void __launch_bounds__({block}) {symbol}({head}) {{\n{body}}}\n'
    return Source(symbol, code, grid, block, arguments)
