"""Generated CUDA kernels run on a CPU: compiled by g++ as ordinary C++, one fiber for each thread of a block.

`compiled` makes one library of many sources; `Library.launch` runs one on the addresses of NumPy arrays. Threads meet
at `__syncthreads` and at shuffles, all of a block at the same one: a thread that waits elsewhere is an error.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from onnxmesh.runtime.cuda.codegen.operand import Source
from onnxmesh.runtime.cuda.codegen.prelude import MATH, PORTABLE
from onnxmesh.runtime.cuda.launchers import _LAUNCHERS, Job, Launch, Launcher

COMPILER = shutil.which("g++")
"""None where there is none: tests then skip."""


def generated(op: str) -> list[Launcher]:
    """The launchers of an op that generate a kernel."""
    return [function for function in _LAUNCHERS.get(op, ()) if ".codegen." in function.__module__]


def prepare(job: Job) -> Launch | None:
    """As that of runtime/cuda/launchers.py, but with generated kernels only."""
    return next((launch for function in generated(job.kernel) if (launch := function(job)) is not None), None)


_SHIM = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <ucontext.h>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {
constexpr int STACK = 64 * 1024, MOST = 1024;
static std::vector<char> stacks;
static ucontext_t scheduler, contexts[MOST];
static int current, count, waits[MOST];
static bool done[MOST];
static double exchange[MOST];
static void (*body)();
static void enter() { body(); done[current] = true; waits[current] = -1; swapcontext(&contexts[current], &scheduler); }
static void wait(int place) { waits[current] = place; swapcontext(&contexts[current], &scheduler); }
static void block(int threads) {
    if (stacks.empty()) stacks.resize((size_t)STACK * MOST);
    count = threads;
    for (int i = 0; i < count; ++i) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks.data() + (size_t)STACK * i;
        contexts[i].uc_stack.ss_size = STACK;
        contexts[i].uc_link = nullptr;
        makecontext(&contexts[i], enter, 0);
        done[i] = false;
    }
    for (;;) {
        for (current = 0; current < count; ++current) {
            threadIdx.x = current;
            swapcontext(&scheduler, &contexts[current]);
        }
        for (int i = 1; i < count; ++i)
            if (waits[i] != waits[0]) { fprintf(stderr, "threads wait at different places\n"); abort(); }
        if (done[0]) return;
    }
}
}
#define __syncthreads() fibers::wait(1)
template <typename T> inline decltype(+T()) __shfl_xor_sync(unsigned, T x, int step) {  // small integers widen
    memcpy(&fibers::exchange[fibers::current], &x, sizeof(T));
    fibers::wait(2);
    T y;
    memcpy(&y, &fibers::exchange[fibers::current ^ step], sizeof(T));
    fibers::wait(3);
    return y;
}

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
inline float bits_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline double bits_double(unsigned long long x) { double y; memcpy(&y, &x, 8); return y; }
inline float wide(bf16 x) { return bits_float((unsigned)x.bits << 16); }
inline float wide(fp16 x) { _Float16 y; memcpy(&y, &x, 2); return y; }
inline unsigned pack_fp16(float low, float high) {
    _Float16 y[2] = {(_Float16)low, (_Float16)high};
    unsigned z;
    memcpy(&z, y, 4);
    return z;
}
inline unsigned pack_bf16(float low, float high) {
    float x[2] = {low, high};
    unsigned y[2];
    memcpy(y, x, 8);
    for (int i = 0; i < 2; ++i)
        y[i] = x[i] != x[i] ? 0x7fffu : (y[i] + 0x7fffu + (y[i] >> 16 & 1u)) >> 16;
    return y[1] << 16 | y[0];
}
namespace fast {
inline float exp(float x) { return expf(x); }
inline float divide(float x, float y) { return x / y; }
}
"""


class Library:
    """Kernels compiled for this machine."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def launch(self, source: Source, addresses: Sequence[int]) -> None:
        """Run a kernel on these addresses, which stand in the order of its parameters."""
        values = (ctypes.c_void_p * len(addresses))(*addresses)
        getattr(self._library, f"launch_{source.name}")(values, source.grid, source.block)


class Host:
    """Stands in for a GPU: launches are collected, compiled together, and then run, one at a time."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self._library: Library | None = None
        self._lock = threading.Lock()

    def enqueue(self, source: Source, addresses: Sequence[int]) -> Launch:
        """In place of `compiling.enqueue`."""
        self.sources.append(source)

        def launch(stream: int) -> None:
            assert self._library is not None
            with self._lock:
                self._library.launch(source, addresses)

        return launch

    def compile(self, folder: Path) -> None:
        """Make what has been enqueued runnable."""
        self._library = compiled(self.sources, folder)


def compiled(sources: Sequence[Source], folder: Path, prelude: str = "") -> Library:
    """A library of all sources, behind a prelude of their own. Raises CalledProcessError where they are no C++."""
    unique = {source.name: source for source in sources}
    text = [_SHIM, PORTABLE, MATH, prelude]
    for source in unique.values():
        text += [source.code, _launcher(source, prelude)]
    path, library = folder / "kernels.cpp", folder / "kernels.so"
    path.write_text("\n".join(text))
    command = [COMPILER or "g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing"]
    done = subprocess.run([*command, str(path), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return Library(library)


def _launcher(source: Source, prelude: str) -> str:
    """A function that runs a kernel on all blocks, by fibers where its threads meet."""
    name, count = source.name, len(source.arguments)
    types = source.code[source.code.index(name) + len(name) + 1 : source.code.index(") {")].split(", ")
    values = ", ".join(f"({t.rpartition(' ')[0].replace('__restrict__', '')})a[{i}]" for i, t in enumerate(types))
    assert count == len(types)
    meets = "__syncthreads" in prelude + source.code or "all_reduce" in source.code
    each = "for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) fibers::body();"
    loop = "fibers::block(block);" if meets else each
    return f"""
static void** arguments_{name};
static void body_{name}() {{ void** a = arguments_{name}; {name}({values}); }}
extern "C" void launch_{name}(void** a, unsigned grid, unsigned block) {{
    arguments_{name} = a;
    fibers::body = body_{name};
    blockDim = {{block, 1, 1}}; gridDim = {{grid, 1, 1}};
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {{ {loop} }}
}}
"""
