"""Matrix products on a GPU against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime.kernels.registry import Call, TensorType, find

DTYPES = ["float32", "float16", "bfloat16"]
ERROR = {"float64": 1e-12, "float32": 5e-6, "float16": 1.5e-3, "bfloat16": 8e-3}
TANH = {"approximate": "tanh"}
PRODUCT = ["MatMul", 0, 1]
BIASED = ["Add", PRODUCT, 2]
View = Callable[[Any], Any]


@pytest.fixture(scope="module")
def device(gpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A GPU whose choices are kept in a folder of the test's own."""
    gpus(1)
    from onnxmesh.runtime.cuda import launch_all, tuning  # noqa: F401  (registers)
    from onnxmesh.runtime.cuda.device import CudaDevice

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXMESH_CACHE", str(tmp_path_factory.mktemp("cache")))
        tuning._choices.cache_clear()
        made = CudaDevice()
        with made.scope():
            yield made
        tuning._choices.cache_clear()


def dtype(name: str) -> Any:
    """The NumPy dtype of this name."""
    return np.dtype(getattr(ml_dtypes, name, name))


def numbers(name: str, *shape: int) -> np.ndarray:
    """Random numbers of a dtype, small enough that no sum overflows."""
    values = np.random.default_rng(sum(shape) + len(shape)).standard_normal(shape)
    return values.astype(np.float32).astype(dtype(name))


def job(device: Any, op: str, attrs: dict[str, Any], ins: Sequence[Any], out: Any) -> Any:
    """The instruction over arrays on the device."""
    from onnxmesh.runtime.cuda.launchers import Job, Workspace

    return Job(op, attrs, tuple(ins), (out,), (False,) * len(ins), {}, Workspace())


def check(
    device: Any,
    op: str,
    attrs: dict[str, Any],
    ins: Sequence[np.ndarray],
    shape: tuple[int, ...],
    views: Sequence[View | None] = (),
    where: View | None = None,
) -> None:
    """The prepared launch gives what NumPy gives in float64, twice, and writes nowhere else.

    Args:
        shape: of the result, before `where` takes a part of it.
        views: for every input what part of it the op reads.
    """
    from onnxmesh.runtime.cuda.launchers import prepare

    kind = ins[0].dtype
    views = [*views, *[None] * (len(ins) - len(views))]
    there = [view(device.put(x)) if view else device.put(x) for view, x in zip(views, ins)]
    whole = device.put(np.full(shape, 7, kind))
    out = where(whole) if where else whole
    launch = prepare(job(device, op, attrs, there, out))
    assert launch is not None, "the launcher declined"
    whole[...] = 7  # preparing may have written to the result
    for _ in range(2):
        launch(int(device.stream.ptr))
    got = device.get(whole)
    wide = [(view(x) if view else x).astype(np.float64) for view, x in zip(views, ins)]
    mine = where(got) if where else got
    call = Call(np, attrs, (TensorType(np.dtype(np.float64), mine.shape),), {})
    expected = find(op)(call, *wide)
    error = np.linalg.norm(mine.astype(np.float64) - expected) / max(1e-30, np.linalg.norm(expected))
    assert error < ERROR[kind.name], f"relative error {error:.2g}"
    mine[...] = 7
    assert (got.astype(np.float32) == 7).all(), "it wrote outside its result"


# --- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float64", *DTYPES])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((512, 256), (256, 384)),
        ((2, 96, 256), (256, 64)),
        ((37, 41), (41, 29)),
        ((3, 1, 64), (64, 40)),
        ((64, 1), (1, 40)),
        ((64, 40), (40, 1)),
        ((4, 33, 64), (4, 64, 48)),
        ((2, 3, 33, 64), (3, 64, 48)),
        ((2, 1, 33, 64), (1, 3, 64, 48)),
        ((64,), (64, 40)),
        ((40, 64), (64,)),
    ],
)
def test_shapes(device: Any, name: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    a, b = numbers(name, *first), numbers(name, *second)
    shape = np.matmul(np.empty(first, np.int8), np.empty(second, np.int8)).shape
    check(device, "MatMul", {}, [a, b], shape)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("k", "n"), [(1024, 512), (8192, 384), (640, 8192), (100, 24)])
def test_a_few_rows(device: Any, name: str, rows: int, k: int, n: int) -> None:
    check(device, "MatMul", {}, [numbers(name, rows, k), numbers(name, k, n)], (rows, n))


# --- memory -------------------------------------------------------------------------------------------------

VIEWS: dict[str, tuple[View, View]] = {
    "rows": (lambda x: x.repeat(2, axis=-2), lambda x: x[..., : x.shape[-2] // 2, :]),
    "columns": (lambda x: x.repeat(2, axis=-1), lambda x: x[..., x.shape[-1] // 2 :]),
    "odd columns": (lambda x: x.repeat(2, axis=-1), lambda x: x[..., 1 : 1 + x.shape[-1] // 2]),
    "transposed": (lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)), lambda x: x.swapaxes(-1, -2)),
    "heads": (lambda x: np.ascontiguousarray(x.swapaxes(0, 1)), lambda x: x.swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_views(device: Any, name: str, view: str, place: int) -> None:
    a, b, out = numbers(name, 3, 48, 64), numbers(name, 3, 64, 32), np.zeros((3, 48, 32))
    around, inside = VIEWS[view]
    arrays = [around(x) if i == place else x for i, x in enumerate((a, b, out))]
    views = [inside if i == place else None for i in range(3)]
    check(device, "MatMul", {}, arrays[:2], arrays[2].shape, views[:2], views[2])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    ("equation", "first", "second", "result"),
    [
        ("bqhd,bkhd->bhqk", (2, 40, 3, 32), (2, 56, 3, 32), (2, 3, 40, 56)),
        ("bhqk,bkhd->bqhd", (2, 3, 40, 56), (2, 56, 3, 32), (2, 40, 3, 32)),
        ("bshd,hde->bse", (2, 40, 3, 32), (3, 32, 48), (2, 40, 48)),
        ("bsd,dhe->bhse", (2, 40, 64), (64, 3, 32), (2, 3, 40, 32)),
    ],
)
def test_einsum(device: Any, name: str, equation: str, first: Any, second: Any, result: Any) -> None:
    ins = [numbers(name, *first), numbers(name, *second)]
    check(device, "Einsum", {"equation": equation}, ins, result)


# --- epilogues ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize(
    "expression",
    [
        BIASED,
        ["Relu", PRODUCT],
        ["Relu", BIASED],
        ["Gelu", TANH, PRODUCT],
        ["Gelu", TANH, BIASED],
        ["Gelu", BIASED],
        ["Swish", BIASED],
        ["Add", PRODUCT, 3],
        ["Add", 3, BIASED],
        ["Add", ["Relu", BIASED], 3],
        ["Mul", ["Sigmoid", BIASED], 3],
    ],
    ids=lambda expression: "-".join(x for x in str(expression).replace("'", "").split() if x[0] == "[").strip("["),
)
@pytest.mark.parametrize("strided", [False, True])
def test_epilogues(device: Any, name: str, rows: int, expression: Any, strided: bool) -> None:
    shapes = [(2, rows, 256), (256, 128), (128,), (2, rows, 128)]
    ins = [numbers(name, *shape) for shape in shapes]
    width, where = (192, lambda x: x[..., 32:160]) if strided else (128, None)
    check(device, "FusedMatMul", {"expr": expression}, ins, (2, rows, width), where=where)


def test_a_residual_may_lie_in_rows_of_its_own(device: Any) -> None:
    ins = [numbers("bfloat16", *shape) for shape in [(2, 64, 256), (256, 128), (128,), (2, 96, 160)]]
    views = [None, None, None, lambda x: x[:, 16:80, 16:144]]
    check(device, "FusedMatMul", {"expr": ["Add", BIASED, 3]}, ins, (2, 64, 128), views)


# --- choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows", [2, 200])
def test_all_candidates_agree(device: Any, name: str, rows: int) -> None:
    from onnxmesh.runtime.cuda import gemm
    from onnxmesh.runtime.cuda.gemm_problem import contraction, matmul_loops

    ins = [numbers(name, rows, 512), numbers(name, 512, 256), numbers(name, 256)]
    a, b, bias = (device.put(x) for x in ins)
    out, workspace = device.xp.zeros((rows, 256), a.dtype), device.xp.empty(32 << 20, "u1")
    arrays = (a, b, out, bias)
    work = contraction(name, matmul_loops(*arrays), [x.data.ptr for x in arrays], "relu", bias=True)
    assert work is not None
    candidates = list(gemm._candidates(work))
    kinds = {candidate.name.partition(":")[0] for candidate in candidates}
    assert kinds == ({"cublaslt", "gemv"} if rows == 2 else {"cublaslt"})
    x, w, c = (array.astype(np.float64) for array in ins)
    expected = np.maximum(x @ w + c, 0)
    for candidate in candidates:
        again = gemm._candidate(work, candidate.name)
        assert again is not None and again.name == candidate.name
        out.fill(7)
        again.launch(int(workspace.data.ptr), int(device.stream.ptr))
        error = np.linalg.norm(device.get(out).astype(np.float64) - expected) / np.linalg.norm(expected)
        assert error < ERROR[name], candidate.name


def test_a_choice_is_found_again(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxmesh.runtime.cuda import tuning

    ins, shape = [numbers("bfloat16", 96, 320), numbers("bfloat16", 320, 160)], (96, 160)
    check(device, "MatMul", {}, ins, shape)
    assert list(Path(tuning.folder()).glob("gemm-*.json"))
    monkeypatch.setattr(tuning, "timed", lambda *args, **kwargs: pytest.fail("timed again"))
    tuning._choices.cache_clear()  # as a new process would
    check(device, "MatMul", {}, ins, shape)


def test_nothing_is_timed_where_tuning_is_off(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxmesh.runtime.cuda import tuning

    monkeypatch.setenv("ONNXMESH_TUNE", "0")
    monkeypatch.setattr(tuning, "timed", lambda *args, **kwargs: pytest.fail("timed"))
    check(device, "MatMul", {}, [numbers("bfloat16", 72, 320), numbers("bfloat16", 320, 160)], (72, 160))


@pytest.mark.parametrize("rows", [1, 64])
def test_launches_are_captured(device: Any, rows: int) -> None:
    from onnxmesh.runtime.cuda.launchers import prepare

    ins = [numbers("bfloat16", rows, 1024), numbers("bfloat16", 1024, 512), numbers("bfloat16", 512)]
    there, out = [device.put(x) for x in ins], device.xp.zeros((rows, 512), ins[0].dtype)
    launch = prepare(job(device, "FusedMatMul", {"expr": ["Gelu", TANH, BIASED]}, there, out))
    assert launch is not None
    launch(int(device.stream.ptr))
    expected = device.get(out)
    device.stream.begin_capture()
    launch(int(device.stream.ptr))
    graph = device.stream.end_capture()
    for _ in range(3):
        out.fill(0)
        graph.launch(device.stream)
        np.testing.assert_array_equal(device.get(out).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("name", DTYPES)
def test_generic_kernels_multiply_too(device: Any, name: str) -> None:
    for first, second in (((2, 33, 64), (64, 48)), ((2, 1, 33, 64), (1, 3, 64, 48)), ((0, 4), (4, 3))):
        a, b = numbers(name, *first), numbers(name, *second)
        got = device.get(device.xp.matmul(device.put(a)[..., :], device.put(b)))
        expected = np.matmul(a.astype(np.float64), b.astype(np.float64))
        error = np.linalg.norm(got.astype(np.float64) - expected) / max(1e-30, np.linalg.norm(expected))
        assert error < ERROR[name]
