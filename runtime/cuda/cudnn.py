"""cuDNN's scaled dot-product attention through nvidia-cudnn-frontend, from raw pointers.

A plan takes cuDNN 0.05 to 0.9 s to build; equal problems share one. Executing it neither allocates nor waits, so it can
be captured in a CUDA graph. The operation and its limits:
https://github.com/NVIDIA/cudnn-frontend/blob/main/docs/operations/Attention.md
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

Shape = tuple[int, int, int, int]

_ALIGNED = 8
"""Elements in 16 bytes: what rows and pointers are aligned to."""
_LARGEST = 256
_DATA_TYPES = {"bfloat16": "BFLOAT16", "float16": "HALF", "float32": "FLOAT"}


@dataclass(frozen=True, slots=True)
class View:
    """A tensor [b, h, s, d] in memory; strides in elements, 0 where it is broadcast."""

    dtype: str
    shape: Shape
    strides: Shape


@dataclass(frozen=True, slots=True)
class Problem:
    """o = softmax(scale * q k^T + bias) v.

    Attributes:
        q, k, v, o: bfloat16 or float16; q and o have a multiple of the heads of k and v.
        bias: bfloat16 or float32, [1 or b, 1 or h, s, t].
        causal: query i sees keys up to i + t - s; t >= s.
        statistics: the log-sum-exp of every row is written too, float32 [b, h, s] without gaps.
    """

    q: View
    k: View
    v: View
    o: View
    scale: float
    bias: View | None = None
    causal: bool = False
    statistics: bool = False


@dataclass(frozen=True, slots=True)
class Pointers:
    """Addresses on the device; 0 for what a problem does not have."""

    q: int
    k: int
    v: int
    o: int
    bias: int = 0
    statistics: int = 0


def available() -> bool:
    """Whether cuDNN can be called. ONNXMESH_NO_CUDNN in the environment says no."""
    return not os.environ.get("ONNXMESH_NO_CUDNN") and _library() is not None


def takes(problem: Problem, pointers: Pointers) -> bool:
    """Whether cuDNN may be asked for a plan: dtypes, head sizes and alignment are in its range."""
    q, v = problem.q, problem.v
    dtypes = {x.dtype for x in (q, problem.k, v, problem.o)}
    return (
        len(dtypes) == 1
        and q.dtype in ("bfloat16", "float16")
        and all(size % _ALIGNED == 0 and 0 < size <= _LARGEST for size in (q.shape[3], v.shape[3]))
        and all(min(x.shape) > 0 and _regular(x) for x in (q, problem.k, v, problem.o))
        and all(p % 16 == 0 for p in (pointers.q, pointers.k, pointers.v, pointers.o))
    )


class Plan:
    """An execution plan of a problem on one device."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self.workspace = int(graph.get_workspace_size())

    def launch(self, pointers: Pointers, workspace: int, stream: int) -> None:
        """Enqueue on a stream; `workspace` points to `self.workspace` bytes."""
        p = pointers
        values = {1: p.q, 2: p.k, 3: p.v, 4: p.o, 5: p.statistics, 6: p.bias}
        self._graph.execute({uid: x for uid, x in values.items() if x}, workspace, handle=_handle(stream))


def plan(problem: Problem) -> Plan | None:
    """The plan of a problem on the current device, built the first time it is asked for; None if there is none."""
    from cupy.cuda import runtime

    key = (runtime.getDevice(), problem)
    if key not in _PLANS:
        _PLANS[key] = _build(problem)
    return _PLANS[key]


_PLANS: dict[tuple[int, Problem], Plan | None] = {}


class _Handles(threading.local):
    """One thread's handle on every device, and the stream that it is bound to."""

    def __init__(self) -> None:
        self.of_device: dict[int, tuple[Any, int]] = {}


_HANDLES = _Handles()


@cache
def _library() -> Any:
    """The frontend, with a cuDNN behind it; or None."""
    try:
        import cudnn

        cudnn.backend_version()
    except Exception:  # it is not installed, finds no libcudnn (RuntimeError), or finds several (AssertionError)
        return None
    return cudnn


def _handle(stream: int) -> Any:
    """This thread's handle on the current device, bound to `stream`."""
    library = _library()
    from cupy.cuda import runtime

    device = runtime.getDevice()
    handles = _HANDLES.of_device
    handle, bound = handles.get(device) or (library.create_handle(), None)
    if bound != stream:
        library.set_stream(handle=handle, stream=stream)
        handles[device] = handle, stream
    return handle


def _build(problem: Problem) -> Plan | None:
    import cupy

    library = _library()
    graph = define(library, problem, handle=_handle(cupy.cuda.get_current_stream().ptr))
    try:
        graph.build([library.heur_mode.A])
    except Exception:  # cudnnGraphNotSupportedError; the versions differ in what else they raise for the same
        return None
    return Plan(graph)


def define(library: Any, problem: Problem, **context: Any) -> Any:
    """The frontend's graph of a problem, neither validated nor built."""
    kinds = {name: getattr(library.data_type, kind) for name, kind in _DATA_TYPES.items()}
    io, single = kinds[problem.q.dtype], library.data_type.FLOAT
    graph = library.pygraph(io_data_type=io, intermediate_data_type=single, compute_data_type=single, **context)

    def tensor(name: str, uid: int, view: View) -> Any:
        return graph.tensor(
            name=name, uid=uid, dim=list(view.shape), stride=list(_filled(view)), data_type=kinds[view.dtype]
        )

    options: dict[str, Any] = {}
    if problem.bias is not None:
        options["bias"] = tensor("bias", 6, problem.bias)
    if problem.causal:
        options |= _diagonal(library, problem)
    o, statistics = graph.sdpa(
        name="attention",
        q=tensor("q", 1, problem.q),
        k=tensor("k", 2, problem.k),
        v=tensor("v", 3, problem.v),
        attn_scale=problem.scale,
        generate_stats=problem.statistics,
        **options,
    )
    o.set_uid(4).set_output(True).set_dim(list(problem.o.shape)).set_stride(list(_filled(problem.o)))
    if problem.statistics:
        b, h, s, _ = problem.q.shape
        statistics.set_uid(5).set_output(True).set_dim([b, h, s, 1]).set_stride([h * s, s, 1, 1])
        statistics.set_data_type(single)
    return graph


def _diagonal(library: Any, problem: Problem) -> dict[str, Any]:
    """The options of the causal mask: from the top left, or, where there are more keys, from the bottom right.

    With a bias cuDNN does not align to the bottom right; then the diagonal is moved to the right instead.
    """
    past = problem.k.shape[2] - problem.q.shape[2]
    bottom = past > 0 and problem.bias is None
    alignment = library.diagonal_alignment
    return {
        "diagonal_alignment": alignment.BOTTOM_RIGHT if bottom else alignment.TOP_LEFT,
        "diagonal_band_right_bound": 0 if bottom else past,
    }


def _regular(view: View) -> bool:
    """Whether its last dim is contiguous, and the others are neither broadcast nor unaligned."""
    *outer, last = zip(view.shape, view.strides)
    return last[1] == 1 and all(size == 1 or (stride > 0 and stride % _ALIGNED == 0) for size, stride in outer)


def _filled(view: View) -> Shape:
    """The strides, where dims of size 1 have one that leads behind everything: any would do, but not for cuDNN."""
    extent = max(size * stride for size, stride in zip(view.shape, view.strides))
    outer = [extent if size == 1 else stride for size, stride in zip(view.shape[:3], view.strides)]
    return outer[0], outer[1], outer[2], 1
