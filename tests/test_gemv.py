"""The kernel for a few rows, compiled as C++ and run on a CPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import cuda_on_host
import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime.cuda import gemv
from onnxmesh.runtime.cuda.gemm_problem import Epilogue, Operand, Problem
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="needs g++")

_RUN = r"""
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* p, unsigned last) { unsigned old = *p; *p = old >= last ? 0 : old + 1; return old; }
"""
_LAUNCH = r"""
static void** given; static int* sizes; static long long* leading;
static void body() {
    gemv((const T*)given[0], (const T*)given[1], (T*)given[2], (const T*)given[3], (const T*)given[4],
         (float*)given[5], (unsigned*)given[6], sizes[0], sizes[1], sizes[2],
         leading[0], leading[1], leading[2], leading[3]);
}
extern "C" void run(void** a, int* s, long long* l, unsigned tiles, unsigned parts) {
    given = a; sizes = s; leading = l;
    fibers::body = body;
    blockDim = {BLOCK, 1, 1}; gridDim = {tiles, parts, 1};
    for (blockIdx.y = 0; blockIdx.y < parts; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < tiles; ++blockIdx.x) fibers::block(BLOCK);
}
"""


def run(problem: Problem, lanes: int, parts: int, arrays: list[np.ndarray | None], folder: Path) -> None:
    """Launch it on `parts` blocks a tile; arrays are x, w, y, bias, residual."""
    source, library = folder / "gemv.cpp", folder / "gemv.so"
    source.write_text(cuda_on_host._SHIM + _RUN + gemv.code(problem, lanes) + _LAUNCH)
    command = [cuda_on_host.COMPILER or "g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    tiles = -(-problem.n // (lanes * gemv.PACK))
    partial, arrived = np.full(parts * problem.m * problem.n, np.nan, np.float32), np.zeros(tiles, np.uint32)
    addresses = [0 if x is None else x.ctypes.data for x in (*arrays, partial, arrived)]
    given = (ctypes.c_void_p * 7)(*addresses)
    sizes = (ctypes.c_int * 3)(problem.n, problem.k, gemv.rows_each(problem, lanes, parts))
    residual = problem.epilogue.residual
    ldr = residual.leading if residual is not None else 0
    leading = (ctypes.c_longlong * 4)(problem.a.leading, problem.b.leading, problem.out.leading, ldr)
    for _ in range(2):  # the second finds the counters as the first found them
        ctypes.CDLL(str(library)).run(given, sizes, leading, tiles, parts)
    assert not arrived.any()


@pytest.mark.parametrize(
    ("dtype", "m", "k", "n", "lanes", "parts", "bias", "activation", "residual"),
    [
        ("bfloat16", 1, 700, 72, 8, 1, False, "", False),
        ("bfloat16", 3, 2100, 264, 8, 3, True, "gelu", False),
        ("float16", 4, 700, 600, 32, 5, True, "swish", False),
        ("float16", 2, 64, 8, 32, 2, False, "erf_gelu", False),
        ("float32", 2, 333, 40, 8, 1, True, "", True),
        ("float32", 1, 40, 264, 32, 9, True, "relu", False),
    ],
)
def test_values(
    dtype: str,
    m: int,
    k: int,
    n: int,
    lanes: int,
    parts: int,
    bias: bool,
    activation: str,
    residual: bool,
    tmp_path: Path,
) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(k)
    x, w, b, r = (rng.standard_normal(shape).astype(kind) for shape in ((m, k + 1), (k, n + 8), (n,), (m, n + 2)))
    y = np.full((m, n + 3), 7, kind)
    epilogue = Epilogue(bias, activation, Operand(False, n + 2, 0, 16) if residual else None)
    operands = [Operand(False, size, 0, 16) for size in (k + 1, n + 8, n + 3)]
    problem = Problem(dtype, m, n, k, 1, *operands, epilogue)
    assert gemv.takes(problem)
    run(problem, lanes, parts, [x, w, y, b if bias else None, r if residual else None], tmp_path)

    expected = x[:, :k].astype(np.float64) @ w[:, :n].astype(np.float64)
    expected = _activated(expected + (b.astype(np.float64) if bias else 0), activation)
    expected = expected + (r[:, :n].astype(np.float64) if residual else 0)
    error = np.linalg.norm(y[:, :n].astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if dtype == "float32" else 4e-3)
    assert (y[:, n:].astype(np.float32) == 7).all()


def _activated(x: np.ndarray, activation: str) -> np.ndarray:
    if not activation:
        return x
    op = {"relu": "Relu", "swish": "Swish"}.get(activation, "Gelu")
    attrs = {"approximate": "tanh"} if activation == "gelu" else {}
    return np.asarray(find(op)(Call(np, attrs, (TensorType(x.dtype, x.shape),), {}), x))


@pytest.mark.parametrize(("n", "k"), [(3584, 8192), (8192, 1024), (1280, 8192), (128256, 8192), (64, 64), (8, 8)])
def test_blocks_share_the_rows_of_a_matrix_until_the_gpu_is_full(n: int, k: int) -> None:
    problem = Problem("bfloat16", 1, n, k, 1, *(Operand(False, size, 0, 256) for size in (k, n, n)))
    for lanes, parts in gemv.shares(problem, 132):
        each = gemv.rows_each(problem, lanes, parts)
        assert each * parts >= problem.k
        tiles = -(-n // (8 * lanes))
        assert tiles * parts >= 132 or parts == max(1, k // (16 * 256 // lanes))


def test_what_cannot_be_read_sixteen_bytes_at_a_time_is_declined() -> None:
    def problem(m: int, n: int, alignment: int, transposed: bool) -> Problem:
        w = Operand(transposed, n, 0, alignment)
        return Problem("bfloat16", m, n, 64, 1, Operand(False, 64, 0, 256), w, Operand(False, n, 0, 256))

    assert gemv.takes(problem(4, 64, 16, False))
    assert not gemv.takes(problem(5, 64, 16, False))
    assert not gemv.takes(problem(4, 60, 16, False))
    assert not gemv.takes(problem(4, 64, 8, False))
    assert not gemv.takes(problem(4, 64, 16, True))
