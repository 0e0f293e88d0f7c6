"""Attention on a GPU, through cuDNN and by our own kernel, against the NumPy kernel in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime.kernels.registry import Call, TensorType, find

ERROR = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.2e-2}
B, H, G, S, T, D = 2, 8, 2, 192, 320, 64


@pytest.fixture(scope="module")
def device(gpus: Any) -> Iterator[Any]:
    """A GPU whose launchers are registered."""
    gpus(1)
    import onnxmesh.runtime.cuda.launch_all  # noqa: F401
    from onnxmesh.runtime.cuda.device import CudaDevice

    made = CudaDevice()
    with made.scope():
        yield made


@pytest.fixture
def plans(device: Any, table: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What cuDNN is asked for, and whether it had a plan."""
    from onnxmesh.runtime.cuda import attention, cudnn

    if not cudnn.available():
        pytest.skip("cuDNN's frontend is missing")
    asked: list[Any] = []
    plan = cudnn.plan

    def noted(problem: Any) -> Any:
        found = plan(problem)
        asked.append((problem, found is not None))
        return found

    monkeypatch.setattr(cudnn, "plan", noted)
    monkeypatch.setattr(attention, "_is_large", lambda job: True)
    yield asked
    table.extend(f"cuDNN has no plan for {problem}" for problem, found in asked if not found)


def dtype(name: str) -> Any:
    return np.dtype(getattr(ml_dtypes, name, name))


def tensors(name: str, b: int, h: int, g: int, s: int, t: int, d: int, e: int, layout: str) -> list[np.ndarray]:
    """q, k, v; in memory [b, h, s, d], or [b, s, h, d], or as slices of one [b, s, heads, d] (packed)."""
    rng = np.random.default_rng(s + t + d)

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32).astype(dtype(name))

    if layout == "bhsd":
        return [numbers(b, h, s, d), numbers(b, g, t, d), numbers(b, g, t, e)]
    if layout == "packed":
        assert s == t and d == e
        whole = numbers(b, s, h + 2 * g, d).swapaxes(1, 2)
        return [whole[:, :h], whole[:, h : h + g], whole[:, h + g :]]
    return [numbers(b, n, x, w).swapaxes(1, 2) for n, x, w in ((s, h, d), (t, g, d), (t, g, e))]


def there(device: Any, x: np.ndarray | None) -> Any:
    """The array on the device, with its strides."""
    if x is None:
        return None
    root = x if x.base is None or not isinstance(x.base, np.ndarray) else x.base
    while isinstance(root.base, np.ndarray):
        root = root.base
    import cupy

    whole = device.put(np.ascontiguousarray(root).reshape(-1))
    offset = (x.__array_interface__["data"][0] - root.__array_interface__["data"][0]) // x.itemsize
    return cupy.ndarray(x.shape, x.dtype, whole.data + offset * x.itemsize, x.strides)


def check(
    device: Any,
    qkv: list[np.ndarray],
    mask: np.ndarray | None = None,
    positions: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    constant: bool = True,
    op: str = "Attention",
    graph: bool = True,
    **attrs: Any,
) -> list[np.ndarray]:
    """Prepare, launch once, replay in a CUDA graph over other memory, and compare; the outputs."""
    import cupy

    from onnxmesh.runtime.cuda.launchers import Job, Workspace, prepare

    q, _, v = qkv
    b, h, s, _ = q.shape
    host: list[Any] = [*qkv, mask, *(positions or (None, None))]
    arrays = [there(device, x) for x in host]
    outs = [device.put(np.full((b, s, h, v.shape[3]), 7, q.dtype)).swapaxes(1, 2)]
    if op == "AttentionBlock":
        outs += [device.put(np.full((b, h, s, 1), 7, np.float32)) for _ in range(2)]
    attrs = {"scale": 0.2, **attrs}
    job = Job(op, attrs, tuple(arrays), tuple(outs), (False,) * 3 + (constant,) * 3, {}, Workspace())
    launch = prepare(job)
    assert launch is not None, "the launchers declined"
    _ = job.workspace.ptr
    stream = cupy.cuda.get_current_stream()
    launch(stream.ptr)
    stream.synchronize()
    if graph:
        for out in outs:
            out.fill(5)
        stream.synchronize()
        stream.begin_capture()
        launch(stream.ptr)
        captured = stream.end_capture()
        captured.launch(stream)
        stream.synchronize()
    types = tuple(TensorType(np.dtype(np.float32), x.shape) for x in outs)
    wide = [x.astype(np.float32) if i < 3 else x for i, x in enumerate(host)]
    want = find(op)(Call(np, attrs, types, {}), *wide)
    got = [device.get(x).astype(np.float32) for x in outs]
    error = ERROR[q.dtype.name]
    np.testing.assert_allclose(got[0], want if op == "Attention" else want[0], error, error)
    if op == "AttentionBlock":
        with np.errstate(divide="ignore"):
            lse, expected = (m.clip(-1e30) + np.log(l) for _, m, l in (got, want))
        np.testing.assert_allclose(lse, expected, 1e-3, 2e-3)
        np.testing.assert_array_equal(got[2] == 0, want[2] == 0)
    return got


# --- through cuDNN ------------------------------------------------------------------------------------------


def fused(plans: list[Any], calls: int = 1) -> None:
    """cuDNN had all the plans that it was asked for."""
    assert len(plans) == calls, plans
    assert all(found for _, found in plans), [problem for problem, found in plans if not found]


@pytest.mark.parametrize("op", ["Attention", "AttentionBlock"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "packed"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_all_keys(device: Any, plans: list[Any], name: str, layout: str, op: str) -> None:
    check(device, tensors(name, B, H, G, T, T, D, D, layout), op=op)
    fused(plans)


@pytest.mark.parametrize(("d", "e"), [(128, 128), (72, 72), (192, 128), (256, 256), (64, 128)])
def test_sizes_of_heads(device: Any, plans: list[Any], d: int, e: int) -> None:
    """cuDNN or, where it has no plan, our own kernel."""
    check(device, tensors("bfloat16", 1, 4, 4, 130, 257, d, e, "bshd"))


POSITIONS = {
    "causal": (np.arange(S), np.arange(S), 1),
    "causal with a past": (np.arange(S) + T - S, np.arange(T), 1),
    "one rank of all": (np.arange(S) + 64, np.arange(T), 1),
    "all": (np.arange(S) + T, np.arange(T), 1),
    "none": (np.arange(S), np.arange(T) + S, 0),
    "first rows without keys": (np.arange(S) - 50, np.arange(S), 1),
    "last rows see all": (np.arange(T), np.arange(S), 2),
    "two segments": (np.r_[32:64, 160:320], np.r_[0:32, 64:160], 2),
    "another order": (np.arange(S), np.random.default_rng(1).permutation(S), 1),
}


@pytest.mark.parametrize("op", ["Attention", "AttentionBlock"])
@pytest.mark.parametrize("name", POSITIONS)
def test_positions(device: Any, plans: list[Any], name: str, op: str) -> None:
    q_pos, k_pos, calls = POSITIONS[name]
    qkv = tensors("bfloat16", B, H, G, len(q_pos), len(k_pos), D, D, "bshd")
    check(device, qkv, None, (q_pos.astype(np.int64), k_pos.astype(np.int64)), op=op, masked_row="zero")
    fused(plans, calls)


@pytest.mark.parametrize("masked_row", ["nan", "zero", "uniform"])
def test_positions_that_are_computed(device: Any, plans: list[Any], masked_row: str) -> None:
    positions = np.arange(S) - 20, np.arange(T)
    check(
        device, tensors("bfloat16", B, H, G, S, T, D, D, "bshd"), None, positions, constant=False, masked_row=masked_row
    )
    fused(plans)


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    keys = rng.random((B, 1, 1, T)) < 0.7
    keys[0, ..., :200] = False
    rows = rng.random((B, 1, S, T)) < 0.7
    rows[:, :, 5] = False
    heads = rng.standard_normal((1, H, S, T)).astype(np.float32)
    lowest = np.where(rows, 0, np.finfo(np.float32).min).astype(np.float32)
    return {
        "keys": keys,
        "rows": rows,
        "rows of heads": rng.random((B, H, S, T)) < 0.7,
        "added": heads,
        "added, infinite": np.where(rows, 0, -np.inf).astype(np.float32),
        "added, the lowest": lowest,
        "added in bfloat16": np.where(rows, 0, ml_dtypes.finfo(dtype("bfloat16")).min).astype(dtype("bfloat16")),
        "added, the lowest and infinite": np.where(rng.random(rows.shape) < 0.2, -np.inf, lowest).astype(np.float32),
    }


@pytest.mark.parametrize("positions", ["no positions", "positions"])
@pytest.mark.parametrize("masked_row", ["zero", "uniform"])
@pytest.mark.parametrize("mask", masks())
def test_masks(device: Any, plans: list[Any], mask: str, masked_row: str, positions: str) -> None:
    given = (np.arange(S) + 7, np.arange(T)) if positions == "positions" else None
    qkv = tensors("bfloat16", B, H, G, S, T, D, D, "bshd")
    check(device, qkv, masks()[mask], given, constant=mask != "keys", op="AttentionBlock", masked_row=masked_row)
    assert plans[-1][1], "cuDNN takes it in none of the ways"


@pytest.mark.parametrize("keys", [64, 100, 129, 321])
def test_masks_of_any_width(device: Any, plans: list[Any], keys: int) -> None:
    mask = np.random.default_rng(keys).random((1, 1, 70, keys)) < 0.5
    check(device, tensors("float16", 1, 4, 4, 70, keys, D, D, "bhsd"), mask, masked_row="zero")
    fused(plans)


def test_equal_problems_share_a_plan(device: Any, plans: list[Any]) -> None:
    from onnxmesh.runtime.cuda import cudnn

    qkv = tensors("bfloat16", B, H, G, S, T, D, D, "bshd")
    check(device, qkv)
    before = len(cudnn._PLANS)
    check(device, qkv)
    assert len(cudnn._PLANS) == before


def test_blocks_merge_to_attention(device: Any, plans: list[Any]) -> None:
    """A ring of four ranks, seen by the second: a whole block, a causal one, and two that are hidden."""
    q, k, v = tensors("bfloat16", 1, H, G, 4 * S, 4 * S, D, D, "bhsd")
    q_pos = np.arange(S, 2 * S)
    q, state = q[:, :, S : 2 * S].copy(), None
    for block in range(4):
        keys = slice(block * S, (block + 1) * S)
        positions = (q_pos, np.arange(4 * S)[keys].copy())
        part = check(device, [q, k[:, :, keys].copy(), v[:, :, keys].copy()], None, positions, op="AttentionBlock")
        types = tuple(TensorType(np.dtype(np.float32), x.shape) for x in part)
        state = part if state is None else find("AttentionMerge")(Call(np, {}, types, {}), *state, *part)
    assert len(plans) == 2
    types = (TensorType(np.dtype(np.float32), q.shape),)
    wide = [x.astype(np.float32) for x in (q, k, v)]
    want = find("Attention")(Call(np, {"scale": 0.2}, types, {}), *wide, None, q_pos, np.arange(4 * S))
    assert state is not None
    np.testing.assert_allclose(state[0], want, 1.2e-2, 1.2e-2)


# --- by our own kernel --------------------------------------------------------------------------------------

DIRECT: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "float32": ("float32", (2, 8, 2, 100, 200, 64, 48), {}),
    "many rows": ("float32", (1, 24, 24, 1024, 512, 128, 128), {}),
    "softcap": ("bfloat16", (1, 4, 2, 60, 130, 64, 64), {"softcap": 5.0}),
    "odd heads": ("bfloat16", (1, 4, 2, 33, 70, 20, 36), {}),
    "wide heads": ("float16", (1, 2, 2, 70, 140, 512, 512), {}),
    "one token": ("bfloat16", (1, 8, 1, 1, 5000, 128, 128), {}),
    "one token, many heads": ("bfloat16", (4, 64, 8, 1, 700, 128, 128), {}),
    "one key": ("bfloat16", (1, 8, 1, 1, 1, 128, 128), {}),
    "rounded scores": ("float16", (1, 2, 2, 9, 12, 16, 16), {"qk_dtype": "float16"}),
}


@pytest.mark.parametrize("op", ["Attention", "AttentionBlock"])
@pytest.mark.parametrize("name", DIRECT)
def test_our_own_kernel(device: Any, name: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXMESH_NO_CUDNN", "1")
    kind, shape, attrs = DIRECT[name]
    check(device, tensors(kind, *shape, "bshd"), op=op, **attrs)


@pytest.mark.parametrize("masked_row", ["nan", "zero", "uniform"])
@pytest.mark.parametrize("mask", masks())
def test_our_own_kernel_with_masks(device: Any, mask: str, masked_row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXMESH_NO_CUDNN", "1")
    positions = np.arange(S) - 3, np.arange(T)
    qkv = tensors("float32", B, H, G, S, T, D, D, "bshd")
    check(device, qkv, masks()[mask], positions, constant=False, masked_row=masked_row)
