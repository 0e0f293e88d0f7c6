"""Matrix products: MatMul and FusedMatMul as launches of cuBLASLt, or of our own kernel for a few rows.

CuPy's own products cannot be captured in a CUDA graph. What a library's epilogue does not hold (GELU by erf, Swish,
what comes after an activation) is one more launch, of the kernel generated for it, in place in the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import cache
from math import prod
from typing import Any

import numpy as np

from onnxmesh.runtime.cuda import cublaslt, gemv
from onnxmesh.runtime.cuda.cublaslt import Algorithm, Product
from onnxmesh.runtime.cuda.gemm_epilogue import Split, splits
from onnxmesh.runtime.cuda.gemm_problem import FLOATS, Contraction, Loop, Problem, contraction, matmul_loops
from onnxmesh.runtime.cuda.launchers import Job, Launch, Workspace, chain, launcher, prepare
from onnxmesh.runtime.cuda.tuning import Candidate, choose
from onnxmesh.runtime.kernels.registry import Array

_CANDIDATES = 8
_BIAS_ALIGNMENT = 16
_CUBLASLT = "cublaslt"


def available() -> bool:
    """Whether cuBLASLt can be called."""
    return cublaslt.available()


# --- launchers ----------------------------------------------------------------------------------------------


@launcher("MatMul")
def launch_matmul(job: Job) -> Launch | None:
    """a [..., m, k] times b [..., k, n], as numpy.matmul."""
    return _launch_split(job, Split())


@launcher("FusedMatMul")
def launch_fused(job: Job) -> Launch | None:
    """The value of `expr`: a product and what is done to it (docs/fusion.md)."""
    a, b = job.ins[:2]
    if a is None or b is None or a.ndim < 2 or b.ndim < 2:
        return None
    product = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    shapes = [None if x is None else x.shape for x in job.ins]
    for split in splits(job.attrs["expr"], shapes, product):
        if split.rest is not None and product != job.outs[0].shape:
            continue
        launch = _launch_split(job, split)
        if launch is not None:
            return launch
    return None


def launch_contraction(
    job: Job, nest: Sequence[Loop], arrays: Sequence[Array], split: Split | None = None
) -> Launch | None:
    """What launches a loop nest over a, b, the result, then bias and residual; None where it cannot be.

    Args:
        split: what is done to the product; its inputs are those `arrays`, its rest is not looked at.
    """
    split, out = split or Split(), arrays[2]
    if any(x.dtype != out.dtype for x in arrays) or out.dtype.name not in FLOATS:
        return None
    if out.size == 0:
        return lambda stream: None
    if any(loop.size == 0 for loop in nest):
        return None
    addresses = [x.data.ptr for x in arrays]
    bias = split.bias is not None
    work = contraction(out.dtype.name, nest, addresses, split.activation, bias=bias)
    if work is None:
        return None
    problem = replace(work.problem, multiprocessors=job.multiprocessors)
    return _launch(replace(work, problem=problem), job.workspace)


def _launch_split(job: Job, split: Split) -> Launch | None:
    a, b, out = job.ins[0], job.ins[1], job.outs[0]
    extra = [job.ins[i] for i in (split.bias, split.residual) if i is not None]
    if a is None or b is None or any(x is None for x in extra):
        return None
    after = _rest(job, split)
    if split.rest is not None and after is None:
        return None
    arrays = [a, b, out, *extra]
    product = launch_contraction(job, matmul_loops(*arrays), arrays, split)
    return product if product is None or after is None else chain([product, after])


def _rest(job: Job, split: Split) -> Launch | None:
    """The launch of what is left, in place in the result."""
    if split.rest is None:
        return None
    ins, constant = (job.outs[0], *job.ins[2:]), (False, *job.constant[2:])
    return prepare(replace(job, kernel="Fused", attrs={"expr": split.rest}, ins=ins, constant=constant))


def _launch(work: Contraction, workspace: Workspace) -> Launch | None:
    """The fastest way to do the work."""
    key = json.dumps([*astuple(work.problem), len(work.addresses), cublaslt.tf32()])
    chosen = choose(key, lambda: _candidates(work), lambda name: _candidate(work, name))
    if chosen is None:
        return None
    workspace.reserve(chosen.workspace)
    enqueue = chosen.launch
    return lambda stream: enqueue(workspace.ptr, stream)


# --- candidates ---------------------------------------------------------------------------------------------


def _candidates(work: Contraction) -> Iterator[Candidate]:
    """All ways to do the work, the library's first."""
    product = _product(work)
    if product is not None:
        for algorithm in product.algorithms(_CANDIDATES):
            yield _of_library(work, product, algorithm)
    yield from gemv.candidates(work)


def _candidate(work: Contraction, name: str) -> Candidate | None:
    """The one of this name, if it (still) can do the work."""
    kind, _, rest = name.partition(":")
    if kind != _CUBLASLT:
        return next((candidate for candidate in gemv.candidates(work) if candidate.name == name), None)
    try:
        data = bytes.fromhex(rest)
    except ValueError:
        return None
    product = _product(work)
    algorithm = None if product is None else product.check(data)
    return None if product is None or algorithm is None else _of_library(work, product, algorithm)


def _product(work: Contraction) -> Product | None:
    """The library's descriptors of the work, if it has its epilogue."""
    problem, bias = work.problem, work.addresses[0][3] if work.problem.epilogue.bias else 0
    if not cublaslt.available() or not cublaslt.has(problem.epilogue) or bias % _BIAS_ALIGNMENT:
        return None
    if problem.epilogue.activation == "gelu" and problem.dtype in ("float32", "float64"):
        return None  # the library's tanh is an approximation that suits half precision
    return Product(problem, bias)


def _of_library(work: Contraction, product: Product, algorithm: Algorithm) -> Candidate:
    bound = [product.bound(algorithm, addresses) for addresses in work.addresses]

    def launch(workspace: int, stream: int) -> None:
        for one in bound:
            one(workspace, stream)

    return Candidate(f"{_CUBLASLT}:{algorithm.data.hex()}", launch, algorithm.workspace)


# --- generic kernels ----------------------------------------------------------------------------------------


def takes(a: Array, b: Array) -> bool:
    """Whether cuBLASLt multiplies these: matrices of one float dtype."""
    return a.dtype == b.dtype and a.dtype.name in FLOATS and a.ndim >= 2 and b.ndim >= 2 and available()


def matmul(xp: Any, a: Array, b: Array) -> Array:
    """a [..., m, k] times b [..., k, n], as numpy.matmul, in memory of its own; nothing is timed."""
    if not takes(a, b):
        return xp.matmul(a, b)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = xp.empty((*batch, a.shape[-2], b.shape[-1]), a.dtype)
    if out.size == 0 or a.shape[-1] == 0:
        out.fill(0)
        return out
    work = _plain(a, b, out)
    if work is None:
        whole = b.shape if prod(b.shape[:-2]) == 1 else (*batch, *b.shape[-2:])
        a = xp.ascontiguousarray(xp.broadcast_to(a, (*batch, *a.shape[-2:])))
        b = xp.ascontiguousarray(xp.broadcast_to(b, whole))
        work = _plain(a, b, out)
    known = None if work is None else _first(xp.cuda.runtime.getDevice(), work.problem)
    if work is None or known is None:
        return xp.matmul(a, b)
    product, algorithm = known
    workspace, stream = xp.empty(max(algorithm.workspace, 256), xp.uint8), xp.cuda.get_current_stream().ptr
    for addresses in work.addresses:
        product.bound(algorithm, addresses)(workspace.data.ptr, stream)
    return out


def _plain(a: Array, b: Array, out: Array) -> Contraction | None:
    return contraction(out.dtype.name, matmul_loops(a, b, out), [x.data.ptr for x in (a, b, out)])


@cache
def _first(device: int, problem: Problem) -> tuple[Product, Algorithm] | None:
    """The library's first choice for a problem without a bias."""
    product = Product(problem)
    algorithms = product.algorithms(1)
    return (product, algorithms[0]) if algorithms else None
