"""The calls of cuBLASLt, answered by a library on the host (fake_cublaslt.py)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import fake_cublaslt
import numpy as np
import pytest
from test_gemm_problem import BIASED, array

from onnxmesh.runtime.cuda import cublaslt, gemm, gemv
from onnxmesh.runtime.cuda.gemm_problem import Contraction
from onnxmesh.runtime.cuda.launchers import Job, Launch, Workspace
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

PRODUCT = ["MatMul", 0, 1]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cublaslt.Library]:
    """The library, with the first algorithm always chosen."""
    made = fake_cublaslt.install(monkeypatch)
    monkeypatch.setattr(gemv, "candidates", lambda work: iter(()))
    monkeypatch.setattr(gemm, "choose", lambda key, candidates, revive: next(iter(candidates()), None))
    monkeypatch.setattr(Workspace, "ptr", 4096)
    yield made
    for cached in (cublaslt.available, cublaslt.version, cublaslt._handle):
        cached.cache_clear()


def check(expression: Any, ins: list[Any], out: Any) -> None:
    """The launch writes what the generic kernel gives, and nothing else of the result's memory."""
    whole = out if out.base is None else out.base
    whole[...] = 7
    op, attrs = ("MatMul", {}) if expression is None else ("FusedMatMul", {"expr": expression})
    job = Job(op, attrs, tuple(ins), (out,), (False,) * len(ins), {}, Workspace())
    launch: Launch | None = gemm.launch_matmul(job) if expression is None else gemm.launch_fused(job)
    assert launch is not None
    launch(0)
    call = Call(np, attrs, (TensorType(out.dtype, out.shape),), {})
    expected = find(op)(call, *(np.asarray(x) for x in ins))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    out[...] = 7
    assert (np.asarray(whole) == 7).all()


VIEWS = {
    "plain": lambda *shape: array(*shape),
    "rows": lambda *shape: array(shape[0], shape[1] + 3, shape[2])[:, 2:-1],
    "columns": lambda *shape: array(*shape[:2], shape[2] + 4)[..., 3:-1],
    "transposed": lambda *shape: array(shape[0], shape[2], shape[1]).transpose(0, 2, 1),
    "heads": lambda *shape: array(shape[1], shape[0], shape[2]).transpose(1, 0, 2),
}


@pytest.mark.parametrize("a", VIEWS)
@pytest.mark.parametrize("b", VIEWS)
@pytest.mark.parametrize("out", VIEWS)
def test_memory(a: str, b: str, out: str) -> None:
    check(None, [VIEWS[a](2, 6, 8), VIEWS[b](2, 8, 4)], VIEWS[out](2, 6, 4))


@pytest.mark.parametrize(
    "expression", [BIASED, ["Relu", PRODUCT], ["Relu", BIASED], ["Add", PRODUCT, 3], ["Add", BIASED, 3]]
)
@pytest.mark.parametrize("a", ["plain", "rows", "columns"])
@pytest.mark.parametrize("out", ["plain", "rows", "columns", "heads"])
def test_epilogues(expression: Any, a: str, out: str) -> None:
    ins = [VIEWS[a](2, 6, 8), array(8, 16), _aligned(16), VIEWS["columns"](2, 6, 16)]
    check(expression, ins, VIEWS[out](2, 6, 16))


def _aligned(size: int) -> Any:
    """A bias that begins where the library takes it."""
    memory = array(size + 8)
    start = -memory.ctypes.data % 16 // 4
    return memory[start : start + size]


def test_a_bias_elsewhere_is_added_after(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[Any] = []
    monkeypatch.setattr(gemm, "prepare", lambda job: rests.append(job.attrs["expr"]))
    bias = _aligned(20)[1:17]
    ins = (array(6, 8), array(8, 16), bias)
    assert (
        gemm.launch_fused(Job("FusedMatMul", {"expr": BIASED}, ins, (array(6, 16),), (False,) * 3, {}, Workspace()))
        is None
    )
    assert rests == [["Add", 0, 1]]


def test_what_a_launch_no_longer_needs_is_destroyed(library: fake_cublaslt.Library) -> None:
    check(None, [array(6, 8), array(8, 4)], array(6, 4))
    gc.collect()
    assert len(library.objects) == 1  # the handle


def test_an_algorithm_is_found_again_by_its_bytes() -> None:
    work: list[Contraction] = []

    def keep(given: Contraction, workspace: Workspace) -> Launch:
        work.append(given)
        return lambda stream: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "_launch", keep)
        arrays = (array(6, 8), array(8, 4), array(6, 4))
        gemm.launch_matmul(Job("MatMul", {}, arrays[:2], arrays[2:], (False,) * 2, {}, Workspace()))
    first, second = gemm._candidates(work[0])
    again = gemm._candidate(work[0], second.name)
    assert again is not None and again.name == second.name != first.name
    assert gemm._candidate(work[0], "cublaslt:" + "ff" * 64) is None
    assert gemm._candidate(work[0], "cublaslt:00") is None
    assert gemm._candidate(work[0], "cublaslt:no") is None
    assert gemm._candidate(work[0], "something else") is None


def test_without_the_bindings_products_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXMESH_NO_CUBLASLT", "1")
    cublaslt.available.cache_clear()
    job = Job("MatMul", {}, (array(6, 8), array(8, 4)), (array(6, 4),), (False,) * 2, {}, Workspace())
    assert gemm.launch_matmul(job) is None
