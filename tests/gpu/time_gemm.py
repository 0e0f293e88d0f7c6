"""Prints how fast matrix products are on this GPU: `python tests/gpu/time_gemm.py`.

Every shape runs in a CUDA graph over several sets of matrices, so that weights come from memory and not from a cache.
`first` is the candidate that the library believes the best, `best` the one that is.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import ml_dtypes
import numpy as np

from onnxmesh.runtime.cuda import launch_all, tuning  # noqa: F401  (registers)
from onnxmesh.runtime.cuda.device import CudaDevice
from onnxmesh.runtime.cuda.launchers import Job, Workspace, prepare

TANH = {"approximate": "tanh"}
BIASED = ["Add", ["MatMul", 0, 1], 2]
PLAIN, GELU, RESIDUAL, ERF = None, ["Gelu", TANH, BIASED], ["Add", BIASED, 3], ["Gelu", BIASED]
SHAPES: list[tuple[str, int, int, int, Any]] = [
    ("FLUX up, 1 GPU, bias + gelu", 4608, 3072, 12288, GELU),
    ("FLUX up, 1 GPU, bias + erf gelu", 4608, 3072, 12288, ERF),
    ("FLUX down, 1 GPU, bias + residual", 4608, 12288, 3072, RESIDUAL),
    ("FLUX up, 1 of 8, bias + gelu", 576, 3072, 12288, GELU),
    ("FLUX down, 1 of 8, bias", 576, 12288, 3072, BIASED),
    ("FLUX single out, 1 of 8, bias", 576, 15360, 3072, BIASED),
    ("FLUX qkv, 1 of 8, bias", 576, 3072, 9216, BIASED),
    ("FLUX qkv, TP 1 of 8, bias", 4608, 3072, 1152, BIASED),
    ("FLUX out, TP 1 of 8", 4608, 384, 3072, PLAIN),
    ("FLUX modulation, bias", 1, 3072, 18432, BIASED),
    ("Llama 70B qkv, TP 1 of 8", 4096, 8192, 1280, PLAIN),
    ("Llama 70B gate or up, TP 1 of 8", 4096, 8192, 3584, PLAIN),
    ("Llama 70B down, TP 1 of 8", 4096, 3584, 8192, PLAIN),
    ("Llama 70B qkv, one token", 1, 8192, 1280, PLAIN),
    ("Llama 70B out, one token", 1, 1024, 8192, PLAIN),
    ("Llama 70B gate and up, one token", 1, 8192, 7168, PLAIN),
    ("Llama 70B gate or up, one token", 1, 8192, 3584, PLAIN),
    ("Llama 70B down, one token", 1, 3584, 8192, PLAIN),
    ("Llama 70B head, one token", 1, 8192, 16032, PLAIN),
    ("four tokens", 4, 8192, 3584, PLAIN),
    ("eight tokens", 8, 8192, 3584, PLAIN),
]
APART = 160 << 20
"""Bytes of matrices, more than a cache holds."""


def main() -> None:
    device = CudaDevice()
    print(f"{'':36} {'m':>5} {'k':>6} {'n':>6} | first us | best us | TFLOP/s |  TB/s | chosen")
    with device.scope():
        for name, m, k, n, expression in SHAPES:
            first, _ = measure(device, m, k, n, expression, tune=False)
            best, chosen = measure(device, m, k, n, expression, tune=True)
            rate, moved = 2e-6 * m * n * k / best, 2e-6 * (k * n + m * (n + k)) / best
            print(f"{name:36} {m:5} {k:6} {n:6} | {first:8.1f} | {best:7.1f} | {rate:7.1f} | {moved:5.2f} | {chosen}")


def measure(device: CudaDevice, m: int, k: int, n: int, expression: Any, *, tune: bool) -> tuple[float, str]:
    """Microseconds of one product in a CUDA graph of many, and what was chosen for it."""
    os.environ["ONNXMESH_TUNE"] = str(int(tune))
    xp, workspace, launches = device.xp, Workspace(), []
    kind = ml_dtypes.bfloat16
    sets = max(2, min(32, APART // (2 * k * n)))
    held: list[Any] = []
    for _ in range(sets):
        host = [np.random.default_rng(0).standard_normal(4096).astype(np.float32)]
        ins = [_filled(device, host[0], shape).astype(kind) for shape in ((m, k), (k, n), (n,), (m, n))]
        out = xp.zeros((m, n), kind)
        op, attrs = ("FusedMatMul", {"expr": expression}) if expression else ("MatMul", {})
        ins = ins if expression else ins[:2]
        launch = prepare(Job(op, attrs, tuple(ins), (out,), (False,) * len(ins), {}, workspace))
        assert launch is not None
        launches.append(launch)
        held.append((ins, out))
    stream = device.stream
    for launch in launches:
        launch(int(stream.ptr))
    stream.synchronize()
    stream.begin_capture()
    for launch in launches:
        launch(int(stream.ptr))
    graph = stream.end_capture()
    graph.upload(stream)
    times = []
    for _ in range(12):
        start, end = xp.cuda.Event(), xp.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        stream.synchronize()
        times.append(1000 * float(xp.cuda.get_elapsed_time(start, end)) / sets)
    return statistics.median(times[2:]), _chosen(m, n, k) if tune else ""


def _filled(device: CudaDevice, numbers: np.ndarray, shape: tuple[int, ...]) -> Any:
    return device.xp.resize(device.put(numbers), shape)


def _chosen(m: int, n: int, k: int) -> str:
    """The kind of what was chosen last for a shape."""
    known = tuning._choices(0)._known
    found = [name for key, name in known.items() if f", {m}, {n}, {k}, " in key]
    return ", ".join(sorted({name[:20] for name in found}))


if __name__ == "__main__":
    main()
