"""A product of a few rows with a matrix [k, n]: a kernel that reads the matrix once, as fast as memory gives it.

Every thread holds eight neighbouring columns; the rows of the matrix are dealt to the lines of a block and to blocks.
Blocks leave their sums in the workspace, and the last of a tile to arrive adds them, in one order, and does the
epilogue. Sums are float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

from onnxmesh.runtime.cuda.codegen.prelude import DEVICE, MATH, PORTABLE
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.gemm_problem import Contraction, Problem
from onnxmesh.runtime.cuda.tuning import Candidate

MOST_ROWS = 4
BLOCK = 256
"""Threads of a block."""
PACK = 8
"""Columns of a thread."""
_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "float"}
_LANES = (8, 32)
"""Threads side by side on a row: 8 read 128 bytes of half precision, a cache line."""
_WAVES = (2, 4)
"""Blocks per multiprocessor."""
_LEAST = 16
"""Rows of the matrix for each line of a block, at least, where rows are dealt to several blocks."""
_ACTIVATIONS = {
    "": "x",
    "relu": "m::maximum(x, 0.0f)",
    "gelu": "{quick}::gelu_tanh(x)",
    "erf_gelu": "m::gelu(x)",
    "swish": "{quick}::swish(x, 1.0f)",
}

KERNEL = r"""
// y [M, n] = epilogue(x [M, k] w [k, n]); leading dimensions in elements. `each` rows of w belong to a block.
extern "C" __global__ void __launch_bounds__(BLOCK) gemv(
    const T* __restrict__ x, const T* __restrict__ w, T* y, const T* bias, const T* residual, float* partial,
    unsigned* arrived, int n, int k, int each, int64 ldx, int64 ldw, int64 ldy, int64 ldr
) {
    constexpr int LINES = BLOCK / LANES, COLUMNS = LANES * PACK;
    const int lane = threadIdx.x % LANES, line = threadIdx.x / LANES;
    const int column = blockIdx.x * COLUMNS + lane * PACK;
    const int first = blockIdx.y * each, last = first + each < k ? first + each : k;
    __shared__ float sums[LINES][M][COLUMNS];
    __shared__ unsigned order;

    float sum[M][PACK] = {};
    // All loads of a step are under way at once; in the last step those of rows that are not there are left out.
    const auto step = [&](int row, bool whole) {
        Pack<T, PACK> weight[UNROLL] = {};
        T factor[UNROLL][M] = {};
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
            if (whole || row + u * LINES < last) weight[u] = get<T, PACK>(w + (row + u * LINES) * ldw + column);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int i = 0; i < M; ++i)
                if (whole || row + u * LINES < last) factor[u][i] = x[i * ldx + row + u * LINES];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int i = 0; i < M; ++i)
#pragma unroll
                for (int j = 0; j < PACK; ++j) sum[i][j] += wide(factor[u][i]) * wide(weight[u].v[j]);
    };
    if (column < n) {
        int row = first + line;
        for (; row + (UNROLL - 1) * LINES < last; row += UNROLL * LINES) step(row, true);
        if (row < last) step(row, false);
    }
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < PACK; ++j) sums[line][i][lane * PACK + j] = sum[i][j];
    __syncthreads();

    const bool alone = gridDim.y == 1;
    for (int at = threadIdx.x; at < M * COLUMNS; at += BLOCK) {
        const int i = at / COLUMNS, j = at % COLUMNS, to = blockIdx.x * COLUMNS + j;
        float total = 0.0f;
#pragma unroll
        for (int l = 0; l < LINES; ++l) total += sums[l][i][j];
        if (to < n && alone) STORE(i, to, total);
        if (to < n && !alone) partial[((int64)blockIdx.y * M + i) * n + to] = total;
    }
    if (alone) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) order = atomicInc(&arrived[blockIdx.x], gridDim.y - 1);  // the last sets it back to 0
    __syncthreads();
    if (order != gridDim.y - 1) return;
    __threadfence();
    for (int at = threadIdx.x; at < M * COLUMNS; at += BLOCK) {
        const int i = at / COLUMNS, to = blockIdx.x * COLUMNS + at % COLUMNS;
        if (to >= n) continue;
        float total = 0.0f;
#pragma unroll 8
        for (int part = 0; part < gridDim.y; ++part) total += partial[((int64)part * M + i) * n + to];
        STORE(i, to, total);
    }
}
"""

_STORE = r"""
INLINE float activated(float x) { return ACTIVATION; }
INLINE void store(T* y, const T* bias, const T* residual, int64 to, int64 other, int column, float x) {
    if (HAS_BIAS) x += wide(bias[column]);
    x = activated(x);
    if (HAS_RESIDUAL) x += wide(residual[other]);
    y[to] = narrow(x, T());
}
#define STORE(row, column, x) store(y, bias, residual, row * ldy + column, row * ldr + column, column, x)
"""


def candidates(work: Contraction) -> Iterator[Candidate]:
    """Ways to compute it on the current device; none where it is not such a product."""
    problem, (addresses, *more) = work.problem, work.addresses
    if more or not takes(problem):
        return
    for lanes, parts in shares(problem, problem.multiprocessors or _multiprocessors()):
        yield _candidate(problem, lanes, parts, addresses)


def takes(problem: Problem) -> bool:
    """Whether it is a few rows times a matrix that can be read 16 bytes at a time."""
    a, b = problem.a, problem.b
    wide = problem.n % PACK == 0 and b.leading % PACK == 0 and b.alignment >= 16
    straight = not a.transposed and not b.transposed and problem.batch == 1
    return problem.dtype in _TYPES and problem.m <= MOST_ROWS and wide and straight and problem.k < 2**31 > problem.n


def shares(problem: Problem, multiprocessors: int) -> Iterator[tuple[int, int]]:
    """(threads side by side on a row, blocks that share a tile's rows) worth trying on so large a GPU."""
    for lanes in _LANES:
        tiles, lines = -(-problem.n // (lanes * PACK)), BLOCK // lanes
        most = max(1, problem.k // (_LEAST * lines))
        yield from ((lanes, parts) for parts in sorted({min(most, -(-w * multiprocessors // tiles)) for w in _WAVES}))


def code(problem: Problem, lanes: int) -> str:
    """The kernel's text, but for what only a device has (codegen/prelude.py: DEVICE)."""
    epilogue, quick = problem.epilogue, "m" if problem.dtype == "float32" else "fast"
    names = {
        "M": problem.m,
        "BLOCK": BLOCK,
        "LANES": lanes,
        "PACK": PACK,
        "UNROLL": 8 if problem.m <= 2 else 4,  # rows that a thread asks for at once, as registers allow
        "HAS_BIAS": int(epilogue.bias),
        "HAS_RESIDUAL": int(epilogue.residual is not None),
        "ACTIVATION": _ACTIVATIONS[epilogue.activation].format(quick=quick),
    }
    defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
    return f"{PORTABLE}{MATH}typedef {_TYPES[problem.dtype]} T;\n{defined}{_STORE}{KERNEL}"


def rows_each(problem: Problem, lanes: int, parts: int) -> int:
    """Rows of the matrix that a block takes, of `parts` blocks: whole rounds of its lines."""
    lines = BLOCK // lanes
    return -(-problem.k // (parts * lines)) * lines


def _candidate(problem: Problem, lanes: int, parts: int, addresses: tuple[int, ...]) -> Candidate:
    cupy = import_cupy()
    epilogue, tiles = problem.epilogue, -(-problem.n // (lanes * PACK))
    a, b, out, *rest = addresses
    bias = rest[0] if epilogue.bias else 0
    residual, ldr = (rest[-1], epilogue.residual.leading) if epilogue.residual is not None else (0, 0)
    function, arrived = _compiled(cupy.cuda.runtime.getDevice(), code(problem, lanes)), cupy.zeros(tiles, cupy.uint32)
    partial = ctypes.c_void_p(0)
    arguments = (
        *(ctypes.c_void_p(address) for address in (a, b, out, bias, residual)),
        *(partial, ctypes.c_void_p(arrived.data.ptr)),
        *(ctypes.c_int(size) for size in (problem.n, problem.k, rows_each(problem, lanes, parts))),
        *(ctypes.c_longlong(x) for x in (problem.a.leading, problem.b.leading, problem.out.leading, ldr)),
    )
    table = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(x) for x in arguments))

    def launch(workspace: int, stream: int, keep: object = (function, arrived, arguments)) -> None:
        partial.value = workspace
        cupy.cuda.driver.launchKernel(function.ptr, tiles, parts, 1, BLOCK, 1, 1, 0, stream, ctypes.addressof(table), 0)

    return Candidate(f"gemv:{lanes}x{parts}", launch, 4 * parts * problem.m * problem.n if parts > 1 else 0)


@cache
def _multiprocessors() -> int:
    return int(import_cupy().cuda.Device().attributes["MultiProcessorCount"])


@cache
def _compiled(device: int, text: str) -> Any:
    kernel = import_cupy().RawKernel(DEVICE + text, "gemv", options=("--std=c++17",))
    kernel.compile()
    return kernel.kernel
