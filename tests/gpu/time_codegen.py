"""How fast generated kernels are: `python tests/gpu/time_codegen.py` prints microseconds and GB/s for shapes of FLUX.

Each kernel is replayed in a CUDA graph, over several sets of buffers so that nothing is found in the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
INT64 = np.dtype(np.int64)
F32 = np.dtype(np.float32)
Shape = tuple[int, ...]
Entry = tuple[str, str, dict[str, Any], Sequence[tuple[Any, Shape]], Sequence[tuple[Any, Shape]]]
_SETS, _REPEATS = 6, 10

_SUM = ["Add", 0, ["Mul", 1, 2]]
_MODULATED = ["Add", ["Mul", ["LayerNormalization", {"epsilon": 1e-6}, _SUM], ["Add", 3, ["bfloat16", 1]]], 4]


def entries(tokens: int = 4608) -> list[Entry]:
    """(what, op, attributes, inputs, outputs) of what is timed."""
    x, row, heads = (BF16, (1, tokens, 3072)), (BF16, (1, 1, 3072)), (BF16, (1, tokens, 24, 128))
    wide, head = (BF16, (1, tokens, 12288)), (BF16, (128,))
    tables = [(F32, (tokens, 1, 128))] * 2

    def turned(interleaved: int) -> dict[str, Any]:
        return {"expr": ["Rotary", {"interleaved": interleaved}, ["RMSNormalization", {"epsilon": 1e-6}, 0, 1], 2, 3]}

    stats = (F32, (1, 24, tokens, 1))
    part = [(BF16, (1, 24, tokens, 128)), stats, stats]
    return [
        ("residual + gate + norm + modulation", "FusedNorm", {"expr": _MODULATED}, [x, x, row, row, row], [x, x]),
        ("norm", "LayerNormalization", {"epsilon": 1e-6}, [x], [x]),
        ("norm of heads + rotary, interleaved", "FusedNorm", turned(1), [heads, head, *tables], [heads]),
        ("norm of heads + rotary, halves", "FusedNorm", turned(0), [heads, head, *tables], [heads]),
        ("gated residual", "Fused", {"expr": _SUM}, [x, x, row], [x]),
        ("gelu", "Gelu", {"approximate": "tanh"}, [wide], [wide]),
        ("swish times", "Fused", {"expr": ["Mul", ["Swish", 0], 1]}, [wide, wide], [wide]),
        ("softmax", "Softmax", {}, [(BF16, (24, 512, 4096))], [(BF16, (24, 512, 4096))]),
        ("transpose of heads", "Transpose", {"perm": [0, 2, 1, 3]}, [heads], [(BF16, (1, 24, tokens, 128))]),
        ("transpose of a matrix", "Transpose", {"perm": [1, 0]}, [(BF16, (tokens, 3072))], [(BF16, (3072, tokens))]),
        ("copy", "Identity", {}, [x], [x]),
        ("concat", "Concat", {"axis": 1}, [(BF16, (1, 512, 3072)), x], [(BF16, (1, tokens + 512, 3072))]),
        ("merge of attention", "AttentionMerge", {}, part * 2, part),
        ("gather of rows", "Gather", {}, [(BF16, (32000, 4096)), (INT64, (tokens,))], [(BF16, (tokens, 4096))]),
        ("sum of rows", "ReduceSum", {"axes": [2]}, [x], [(BF16, (1, tokens, 1))]),
        ("sum of columns", "ReduceSum", {"axes": [1]}, [x], [(BF16, (1, 1, 3072))]),
        ("norm of one row", "RMSNormalization", {}, [(BF16, (1, 8192)), (BF16, (8192,))], [(BF16, (1, 8192))]),
    ]  # fmt: skip


def nbytes(arrays: Sequence[tuple[Any, Shape]]) -> int:
    """Bytes of all arrays."""
    return sum(int(np.prod(shape)) * kind.itemsize for kind, shape in arrays)


def microseconds(launches: Sequence[Callable[[int], None]]) -> float:
    """Time of one launch, in a graph that replays them all several times."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for launch in launches:
            launch(stream.ptr)
        stream.synchronize()
        stream.begin_capture()
        for _ in range(_REPEATS):
            for launch in launches:
                launch(stream.ptr)
        graph = stream.end_capture()
        times = []
        for _ in range(5):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop))
    return 1e3 * min(times) / (_REPEATS * len(launches))


def table(tokens: int, wanted: str = "") -> None:
    """Print the rows whose names begin with `wanted`."""
    import cupy

    from onnxmesh.runtime.cuda.codegen import launching, moving  # noqa: F401  (register)
    from onnxmesh.runtime.cuda.launchers import Job, Workspace, prepare

    def array(kind: Any, shape: Shape) -> Any:
        return cupy.zeros(shape, kind)

    for what, op, attrs, ins, outs in entries(tokens):
        if not what.startswith(wanted):
            continue
        launches = []
        for _ in range(_SETS):
            inputs = tuple(array(*x) for x in ins)
            job = Job(op, attrs, inputs, tuple(array(*x) for x in outs), (False,) * len(ins), {}, Workspace())
            launch = prepare(job)
            assert launch is not None, what
            launches.append(launch)
        taken = microseconds(launches)
        moved = nbytes(outs) * 2 if op == "Gather" else nbytes(ins) + nbytes(outs)
        print(f"| {what} | {taken:.2f} | {moved / taken / 1e3:.0f} |", flush=True)


def main(tokens: int) -> None:
    """Print the table, then what other numbers of threads for a row would give."""
    from onnxmesh.runtime.cuda.codegen import rows

    print(f"| {tokens} tokens | us | GB/s |\n|---|---|---|")
    table(tokens)
    for deep in (1, 2, 8):
        print(f"| {deep} vectors of a row for a thread | | |")
        with patch.object(rows, "_DEEP", deep), patch.object(rows, "_KEPT", 64):
            table(tokens, "residual")
            table(tokens, "softmax")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4608)
