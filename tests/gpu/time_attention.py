"""How fast attention is: `python tests/gpu/time_attention.py` prints milliseconds and TFLOP/s in a CUDA graph.
With `--plans`: what each of the plans takes that cuDNN offers.

FLOPs are 2 b h s t (d + e), half of that where it is causal; reads are those of q, k and v.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

_REPEATS, _RUNS = 10, 12


@dataclass(frozen=True)
class Case:
    """One attention: memory in the order [b, s, h, d], bfloat16 unless it says otherwise."""

    what: str
    h: int
    g: int
    s: int
    t: int
    d: int = 128
    op: str = "Attention"
    past: int | None = None
    mask: tuple[int, ...] = ()
    computed: bool = False
    dtype: str = "bfloat16"
    attrs: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("FLUX, 4096 + 512 tokens", 24, 24, 4608, 4608),
    Case("FLUX, 16384 + 512 tokens", 24, 24, 16896, 16896),
    Case("FLUX 16896, one rank of 8, all-gather", 24, 24, 2112, 16896),
    Case("FLUX 16896, one rank of 8, Ulysses", 3, 3, 16896, 16896),
    Case("FLUX 4608, one rank of 8, Ulysses", 3, 3, 4608, 4608),
    Case("FLUX 4608, one rank of 8, a ring's block", 24, 24, 576, 576, op="AttentionBlock"),
    Case("FLUX 16896, one rank of 8, a ring's block", 24, 24, 2112, 2112, op="AttentionBlock"),
    Case("32 q, 8 kv, causal", 32, 8, 8192, 8192, past=0),
    Case("Llama 70B prefill, one rank of 8", 8, 1, 4096, 4096, past=0),
    Case("causal, one rank of 4", 32, 8, 2048, 8192, past=4096),
    Case("causal, positions computed", 32, 8, 4096, 4096, past=0, computed=True),
    Case("a mask of keys", 32, 8, 4096, 4096, mask=(1, 1, 1, 4096)),
    Case("causal and a mask of keys", 32, 8, 4096, 4096, past=0, mask=(1, 1, 1, 4096)),
    Case("a mask of rows", 32, 8, 4096, 4096, mask=(1, 1, 4096, 4096)),
    Case("one token, no cache", 8, 1, 1, 1),
    Case("one token, 8192 keys", 8, 1, 1, 8192),
    Case("one token, 8192 keys, all heads", 64, 8, 1, 8192),
    Case("float32", 24, 24, 1024, 1024, dtype="float32"),
    Case("softcap", 16, 8, 2048, 2048, d=256, attrs={"softcap": 50.0}),
)


def measure(case: Case) -> tuple[float, float]:
    """Milliseconds of one launch, and seconds of preparing it."""
    import cupy

    from onnxmesh.runtime.cuda.launchers import Job, Workspace, prepare

    kind = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))

    numbers = cupy.asarray(np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)).astype(kind)

    def filled(heads: int, rows: int) -> Any:
        return cupy.resize(numbers, (1, rows, heads, case.d)).swapaxes(1, 2)

    ins: list[Any] = [filled(case.h, case.s), filled(case.g, case.t), filled(case.g, case.t)]
    ins.append(cupy.ones(case.mask, bool) if case.mask else None)
    if case.past is not None:
        ins += [cupy.arange(case.s) + case.past, cupy.arange(case.t)]
    outs = [cupy.empty((1, case.s, case.h, case.d), kind).swapaxes(1, 2)]
    if case.op == "AttentionBlock":
        outs += [cupy.empty((1, case.h, case.s, 1), np.float32) for _ in range(2)]
    constant = tuple(i > 3 and not case.computed for i in range(len(ins)))
    attrs = {"masked_row": "zero", **case.attrs}
    start = time.perf_counter()
    job = Job(case.op, attrs, tuple(ins), tuple(outs), constant, {}, Workspace())
    launch = prepare(job)
    assert launch is not None
    _ = job.workspace.ptr
    stream = cupy.cuda.get_current_stream()
    launch(stream.ptr)
    stream.synchronize()
    prepared = time.perf_counter() - start
    return _milliseconds(stream, lambda: launch(stream.ptr)), prepared


def _milliseconds(stream: Any, launch: Callable[[], None]) -> float:
    """Time of one launch, in a graph of several."""
    import cupy

    stream.begin_capture()
    for _ in range(_REPEATS):
        launch()
    graph = stream.end_capture()
    times = []
    for _ in range(_RUNS):
        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        first.record(stream)
        graph.launch(stream)
        last.record(stream)
        last.synchronize()
        times.append(cupy.cuda.get_elapsed_time(first, last) / _REPEATS)
    return statistics.median(times[2:])


def candidates(case: Case) -> None:
    """Print the time of each plan that cuDNN's heuristics offer, in their order: the first is the one that is used."""
    import cudnn as frontend
    import cupy

    from onnxmesh.runtime.cuda import cudnn

    def array(heads: int, rows: int) -> Any:
        return cupy.zeros((1, rows, heads, case.d), ml_dtypes.bfloat16).swapaxes(1, 2)

    def view(x: Any) -> cudnn.View:
        return cudnn.View("bfloat16", x.shape, tuple(n // 2 for n in x.strides))

    arrays = [array(case.h, case.s), array(case.g, case.t), array(case.g, case.t), array(case.h, case.s)]
    q, k, v, o = map(view, arrays)
    problem = cudnn.Problem(q, k, v, o, 0.1, causal=case.past is not None, statistics=case.op == "AttentionBlock")
    stream = cupy.cuda.get_current_stream()
    handle = cudnn._handle(stream.ptr)
    graph = cudnn.define(frontend, problem, handle=handle)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([frontend.heur_mode.A])
    graph.check_support()
    graph.build_plans(frontend.build_plan_policy.ALL)
    statistics_ = cupy.empty(case.h * case.s, np.float32)
    pointers = {i + 1: x.data.ptr for i, x in enumerate([*arrays, *([statistics_] if problem.statistics else [])])}
    found = []
    for index in range(graph.get_execution_plan_count()):
        memory = cupy.empty(max(256, graph.get_workspace_size_plan_at_index(index)), "u1")

        def launch(index: int = index, memory: Any = memory) -> None:
            graph.execute_plan_at_index(pointers, memory.data.ptr, index, handle=handle)

        try:
            launch()
            stream.synchronize()
            found.append(f"{_milliseconds(stream, launch):.4f}")
        except Exception as error:  # a plan that was not built
            found.append(type(error).__name__)
    print(f"{case.what}: {', '.join(found)} ms", flush=True)


def main() -> None:
    """Print the table; with `--plans`, the times of cuDNN's plans."""
    import onnxmesh.runtime.cuda.launch_all  # noqa: F401
    from onnxmesh.runtime.cuda.device import CudaDevice

    if "--plans" in sys.argv:
        with CudaDevice().scope():
            for case in CASES[:9]:
                candidates(case)
        return
    print("| attention | q x k | ms | TFLOP/s | GB/s read | prepared in s |\n|---|---|---|---|---|---|")
    with CudaDevice().scope():
        for case in CASES:
            milliseconds, prepared = measure(case)
            flops = 4.0 * case.h * case.s * case.t * case.d
            if case.past is not None:
                flops *= (case.past + case.s / 2) / case.t
            size = 4 if case.dtype == "float32" else 2
            read = size * case.d * (case.h * case.s + 2 * case.g * case.t)
            rates = f"{flops / milliseconds / 1e9:.1f} | {read / milliseconds / 1e6:.0f}"
            print(f"| {case.what} | {case.s} x {case.t} | {milliseconds:.4f} | {rates} | {prepared:.2f} |", flush=True)


if __name__ == "__main__":
    main()
