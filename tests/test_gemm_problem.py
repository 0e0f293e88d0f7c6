"""What a GEMM library is asked for, done by NumPy on the same memory: no GPU is needed."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxmesh.runtime.cuda import einsum, gemm
from onnxmesh.runtime.cuda.gemm_epilogue import Split, splits
from onnxmesh.runtime.cuda.gemm_problem import Contraction, Operand, Problem, contraction, matmul_loops
from onnxmesh.runtime.cuda.launchers import Job, Launch, Workspace
from onnxmesh.runtime.kernels.registry import Call, TensorType, find


class OnDevice(np.ndarray):
    """An array with its address where CuPy has it."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data)


def array(*shape: int) -> Any:
    """Random float32 numbers."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    return values.view(OnDevice)


def problem(a: Any, b: Any, out: Any, *extra: Any, bias: bool = False) -> Problem:
    """The problem of a MatMul."""
    arrays = (a, b, out, *extra)
    found = contraction("float32", matmul_loops(*arrays), [x.ctypes.data for x in arrays], bias=bias)
    assert found is not None
    return found.problem


def on_host(work: Contraction, workspace: Workspace | None = None) -> Launch:
    """Do the work with NumPy, reading and writing memory as a library would."""

    def launch(stream: int) -> None:
        p = work.problem
        for a, b, out, *rest in work.addresses:
            value = _matrices(a, p.a, p.batch, p.m, p.k) @ _matrices(b, p.b, p.batch, p.k, p.n)
            if p.epilogue.bias:
                value = value + _matrices(rest[0], Operand(False, 0, 0, 4), 1, 1, p.n)
            if p.epilogue.residual is not None:
                value = value + _matrices(rest[-1], p.epilogue.residual, p.batch, p.m, p.n)
            _matrices(out, p.out, p.batch, p.m, p.n)[...] = _activated(value, p.epilogue.activation)

    return launch


def _matrices(address: int, x: Operand, batch: int, rows: int, columns: int) -> np.ndarray:
    shape, strides = (batch, rows, columns), (4 * x.step, 4 * x.leading, 4)
    if x.transposed:
        strides = (4 * x.step, 4, 4 * x.leading)
    assert address % x.alignment == 0
    span = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 4
    memory = (ctypes.c_byte * span).from_address(address)
    return np.ndarray(shape, np.float32, buffer=memory, strides=strides)


def _activated(x: np.ndarray, activation: str) -> np.ndarray:
    if not activation:
        return x
    op = {"relu": "Relu", "swish": "Swish"}.get(activation, "Gelu")
    attrs = {"approximate": "tanh"} if activation == "gelu" else {}
    return np.asarray(find(op)(Call(np, attrs, (TensorType(x.dtype, x.shape),), {}), x))


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products run on the host, and what is left of an expression in its generic kernel."""
    monkeypatch.setattr(gemm, "_launch", on_host)
    monkeypatch.setattr(gemm, "prepare", _generic)


def _generic(job: Job) -> Launch:
    def launch(stream: int) -> None:
        out = job.outs[0]
        call = Call(np, job.attrs, (TensorType(out.dtype, out.shape),), {})
        out[...] = find(job.kernel)(call, *(None if x is None else np.asarray(x) for x in job.ins))

    return launch


def check(
    launcher: Callable[[Job], Launch | None], op: str, attrs: dict[str, Any], ins: Sequence[Any], out: Any
) -> None:
    """The launch writes what the generic kernel gives, and nothing else of the result's memory."""
    whole = out if out.base is None else out.base
    before = np.full_like(whole, 7)
    whole[...] = before
    launch = launcher(Job(op, attrs, tuple(ins), (out,), (False,) * len(ins), {}, Workspace()))
    assert launch is not None
    launch(0)
    call = Call(np, attrs, (TensorType(out.dtype, out.shape),), {})
    expected = find(op)(call, *(np.asarray(x) for x in ins))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert int((np.asarray(whole) != before).sum()) <= out.size


# --- operands -----------------------------------------------------------------------------------------------


def test_all_rows_of_a_batch_meet_a_weight_at_once() -> None:
    found = problem(array(2, 5, 8), array(8, 6), array(2, 5, 6))
    assert (found.m, found.n, found.k, found.batch) == (10, 6, 8, 1)
    assert (found.a.leading, found.b.leading, found.out.leading) == (8, 6, 6)


def test_rows_of_a_slice_are_a_batch_with_one_weight() -> None:
    found = problem(array(2, 9, 8)[:, 4:], array(8, 6), array(2, 5, 6))
    assert (found.m, found.batch, found.a.step, found.b.step, found.out.step) == (5, 2, 72, 0, 30)


def test_columns_of_a_slice_are_a_leading_dimension() -> None:
    found = problem(array(5, 20)[:, 4:12], array(8, 6), array(5, 16)[:, :6])
    assert (found.a.leading, found.out.leading) == (20, 16)


def test_a_transposed_operand_is_read_as_it_lies() -> None:
    found = problem(array(5, 8), array(6, 8).T, array(5, 6))
    assert found.b.transposed and found.b.leading == 8 and not found.a.transposed


def test_one_row_of_many_batches_is_many_rows() -> None:
    found = problem(array(7, 1, 8), array(8, 6), array(7, 1, 6))
    assert (found.m, found.batch) == (7, 1)


def test_a_transposed_result_is_the_product_of_the_transposed() -> None:
    found = problem(array(5, 8), array(8, 6), array(6, 5).T)
    assert (found.m, found.n) == (6, 5) and found.a.transposed and found.b.transposed and not found.out.transposed


def test_heads_that_lie_between_rows_are_a_batch() -> None:
    q, k = array(1, 16, 4, 8).transpose(0, 2, 1, 3), array(1, 16, 4, 8).transpose(0, 2, 3, 1)
    found = problem(q, k, array(1, 4, 16, 16))
    assert (found.batch, found.a.step, found.a.leading, found.b.transposed) == (4, 8, 32, True)


def test_alignment_is_that_of_every_matrix() -> None:
    a = array(2, 4, 4)
    found = problem(a, array(2, 4, 4), array(2, 4, 4))
    assert found.a.alignment == math.gcd(256, a.ctypes.data, 64)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((5, 8), (8, 6)),
        ((3, 5, 8), (8, 6)),
        ((3, 5, 8), (3, 8, 6)),
        ((2, 3, 5, 8), (3, 8, 6)),
        ((2, 1, 5, 8), (1, 3, 8, 6)),
        ((1, 8), (8, 6)),
        ((5, 1), (1, 6)),
        ((5, 8), (8, 1)),
        ((8,), (8, 6)),
        ((5, 8), (8,)),
        ((4, 5, 8), (8,)),
        ((8,), (3, 8, 6)),
        ((8,), (8,)),
        ((5, 8), (3, 8, 6)),
    ],
)
def test_shapes(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    a, b = array(*first), array(*second)
    check(gemm.launch_matmul, "MatMul", {}, [a, b], array(*np.matmul(a, b).shape))


@pytest.mark.parametrize("view", ["plain", "rows", "columns", "transposed", "heads"])
@pytest.mark.parametrize("place", ["a", "b", "out"])
def test_views(place: str, view: str) -> None:
    arrays = {"a": (2, 6, 8), "b": (2, 8, 4), "out": (2, 6, 4)}
    made = {name: _viewed(shape, view if name == place else "plain") for name, shape in arrays.items()}
    check(gemm.launch_matmul, "MatMul", {}, [made["a"], made["b"]], made["out"])


def _viewed(shape: tuple[int, ...], view: str) -> Any:
    b, m, n = shape
    if view == "rows":
        return array(b, m + 3, n)[:, 2:-1]
    if view == "columns":
        return array(b, m, n + 3)[..., 2:-1]
    if view == "transposed":
        return array(b, n, m).transpose(0, 2, 1)
    return array(m, b, n).transpose(1, 0, 2) if view == "heads" else array(b, m, n)


def test_what_no_library_reads_is_declined() -> None:
    job = Job("MatMul", {}, (array(5, 16)[:, ::2], array(8, 6)), (array(5, 6),), (False,) * 2, {}, Workspace())
    assert gemm.launch_matmul(job) is None


def test_an_empty_result_needs_nothing() -> None:
    check(gemm.launch_matmul, "MatMul", {}, [array(0, 8), array(8, 6)], array(0, 6))


# --- epilogues ----------------------------------------------------------------------------------------------

PRODUCT = ["MatMul", 0, 1]
BIASED = ["Add", PRODUCT, 2]
TANH = {"approximate": "tanh"}
SHAPES = [(2, 5, 8), (8, 6), (6,), (2, 5, 6)]


def split(expression: Any) -> Split:
    """The way to split it that leaves the least."""
    return splits(expression, SHAPES, (2, 5, 6))[0]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (BIASED, Split(bias=2)),
        (["Add", 2, PRODUCT], Split(bias=2)),
        (["Relu", PRODUCT], Split(activation="relu")),
        (["Gelu", TANH, BIASED], Split(bias=2, activation="gelu")),
        (["Gelu", BIASED], Split(bias=2, activation="erf_gelu")),
        (["Swish", PRODUCT], Split(activation="swish")),
        (["Add", 3, PRODUCT], Split(residual=3)),
        (["Add", BIASED, 3], Split(bias=2, residual=3)),
        (["Add", ["Relu", BIASED], 3], Split(bias=2, activation="relu", rest=["Add", 0, 2])),
        (["Mul", ["Swish", BIASED], 3], Split(bias=2, activation="swish", rest=["Mul", 0, 2])),
        (["Mul", PRODUCT, ["float32", 2.0]], Split(rest=["Mul", 0, ["float32", 2.0]])),
        (["Mul", ["Sigmoid", BIASED], BIASED], Split(bias=2, rest=["Mul", ["Sigmoid", 0], 0])),
        (["Add", PRODUCT, PRODUCT], Split(rest=["Add", 0, 0])),
    ],
)
def test_what_the_gemm_does(expression: Any, expected: Split) -> None:
    assert split(expression) == expected


def test_all_ways_to_split_end_with_the_bare_product() -> None:
    ways = splits(["Gelu", TANH, BIASED], SHAPES, (2, 5, 6))
    assert ways[1:] == [Split(bias=2, rest=["Gelu", TANH, 0]), Split(rest=["Gelu", TANH, ["Add", 0, 1]])]


@pytest.mark.parametrize(
    "expression",
    [
        BIASED,
        ["Gelu", TANH, BIASED],
        ["Gelu", BIASED],
        ["Add", BIASED, 3],
        ["Add", ["Relu", BIASED], 3],
        ["Mul", ["Swish", BIASED], 3],
        ["Mul", ["Sigmoid", BIASED], BIASED],
        ["Sub", ["float32", 1.0], ["Tanh", PRODUCT]],
    ],
)
@pytest.mark.parametrize("strided", [False, True])
def test_values(expression: Any, strided: bool) -> None:
    out = array(2, 5, 9)[..., 2:8] if strided else array(2, 5, 6)
    ins = [array(2, 5, 8), array(8, 6), array(6), array(2, 5, 6)]
    check(gemm.launch_fused, "FusedMatMul", {"expr": expression}, ins, out)


def test_a_bias_may_have_the_rank_of_the_product() -> None:
    ins = [array(2, 5, 8), array(8, 6), array(1, 1, 6)]
    check(gemm.launch_fused, "FusedMatMul", {"expr": BIASED}, ins, array(2, 5, 6))


def test_a_residual_may_be_a_slice() -> None:
    ins = [array(2, 5, 8), array(8, 6), array(2, 9, 6)[:, 4:]]
    check(gemm.launch_fused, "FusedMatMul", {"expr": BIASED}, ins, array(2, 5, 6))


def test_what_no_library_adds_is_added_after() -> None:
    ins = [array(2, 5, 8), array(8, 6), array(2, 6, 5).transpose(0, 2, 1)]
    check(gemm.launch_fused, "FusedMatMul", {"expr": BIASED}, ins, array(2, 5, 6))
    ins = [array(2, 5, 8), array(8, 6), array(2, 1, 6)]
    check(gemm.launch_fused, "FusedMatMul", {"expr": BIASED}, ins, array(2, 5, 6))


# --- einsum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "first", "second"),
    [
        ("ij,jk->ik", (5, 8), (8, 6)),
        ("ij,jk->ki", (5, 8), (8, 6)),
        ("bqhd,bkhd->bhqk", (2, 5, 3, 8), (2, 7, 3, 8)),
        ("bhqk,bkhd->bqhd", (2, 3, 5, 7), (2, 7, 3, 8)),
        ("bshd,hde->bse", (2, 5, 3, 8), (3, 8, 6)),
        ("bsd,dhe->bhse", (2, 5, 8), (8, 3, 4)),
        ("i,j->ij", (5,), (6,)),
        ("i,i->", (5,), (5,)),
        ("bij,bj->bi", (2, 3, 4), (2, 4)),
        ("ij,j", (3, 4), (4,)),
    ],
)
def test_einsum(equation: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    a, b = array(*first), array(*second)
    out = array(*np.einsum(equation, a, b).shape)
    check(einsum.launch_einsum, "Einsum", {"equation": equation}, [a, b], out)


@pytest.mark.parametrize("equation", ["...ij,jk->...ik", "ii,ij->j", "ij,jk,kl->il"])
def test_einsums_that_are_no_single_product_are_declined(equation: str) -> None:
    ins = tuple(array(4, 4) for _ in range(equation.count(",") + 1))
    job = Job("Einsum", {"equation": equation}, ins, (array(4, 4),), (False,) * len(ins), {}, Workspace())
    assert einsum.launch_einsum(job) is None
