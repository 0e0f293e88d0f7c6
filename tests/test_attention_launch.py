"""How an attention is taken apart for cuDNN, on a CPU: NumPy in cuDNN's place, and our kernels compiled by g++."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cuda_on_host

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.runtime.cuda import attention, cudnn, launchers, raw
from onnxmesh.runtime.cuda.attention_mask_text import PRELUDE
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="needs g++")
BF16 = np.dtype(ml_dtypes.bfloat16)
B, H, G, S, T, D, E = 2, 4, 2, 24, 40, 16, 8
RNG = np.random.default_rng(5)


class OnDevice:
    """A NumPy array that looks like CuPy's."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype, self.shape, self.strides = array, array.dtype, array.shape, array.strides
        self.data = SimpleNamespace(ptr=array.ctypes.data)
        self.size = array.size


CUPY = SimpleNamespace(
    asnumpy=lambda x: x.array,
    empty=lambda n, dtype: OnDevice(np.full(n + 256, 0xFF, dtype)[-np.empty(0).ctypes.data % 16 :]),
    cuda=SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0), get_current_stream=lambda: SimpleNamespace(ptr=0)
    ),
)


def memory(address: int, view: cudnn.View) -> np.ndarray:
    dtype = np.dtype(ml_dtypes.bfloat16) if view.dtype == "bfloat16" else np.dtype(view.dtype)
    strides = [n * dtype.itemsize for n in view.strides]
    nbytes = sum((n - 1) * stride for n, stride in zip(view.shape, strides)) + dtype.itemsize
    return np.ndarray(view.shape, dtype, (ctypes.c_char * nbytes).from_address(address), 0, strides)


class NumpyPlan:
    """What cuDNN computes, and no more than it may be asked for."""

    workspace = 64
    made: list[cudnn.Problem] = []  # noqa: RUF012

    def __init__(self, problem: cudnn.Problem) -> None:
        self.problem = problem
        self.made.append(problem)

    def launch(self, pointers: cudnn.Pointers, workspace: int, stream: int) -> None:
        p = self.problem
        ctypes.memset(workspace, 0xFF, self.workspace)
        q, k, v = (memory(getattr(pointers, n), getattr(p, n)).astype(np.float32) for n in "qkv")
        group = q.shape[1] // k.shape[1]
        scores = p.scale * q @ np.repeat(k, group, 1).swapaxes(2, 3)
        if p.bias is not None:
            scores = scores + memory(pointers.bias, p.bias).astype(np.float32)
        s, t = scores.shape[2:]
        if p.causal:
            assert t >= s
            scores = np.where(np.tri(s, t, t - s, dtype=bool), scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        powers = np.exp(scores - top)
        total = powers.sum(-1, keepdims=True)
        o = memory(pointers.o, p.o)
        o[...] = powers / total @ np.repeat(v, group, 1)
        if p.statistics:
            packed = (q.shape[1] * s, s, 1, 1)
            memory(pointers.statistics, cudnn.View("float32", top.shape, packed))[...] = top + np.log(total)


def bshd(b: int, h: int, s: int, d: int) -> np.ndarray:
    return RNG.standard_normal((b, s, h, d)).astype(BF16).swapaxes(1, 2)


CAUSAL = np.arange(S), np.arange(T)
LATER = np.arange(S) + 10, np.arange(T)
EARLIER = np.arange(S) - 5, np.arange(T)
HIDDEN = np.arange(S), np.arange(T) + S
PERMUTED = np.arange(S), RNG.permutation(T)
KEYS = RNG.random((B, 1, 1, T)) < 0.7
KEYS[0] = False
ROWS = RNG.random((1, H, S, T)) < 0.7
ROWS[:, :, 3] = False
ADDED = np.where(ROWS, RNG.standard_normal((1, H, S, T)), -np.inf).astype(np.float32)
LOWEST = np.where(ROWS, 0, np.finfo(np.float32).min).astype(np.float32)
BF16_LOWEST = np.where(ROWS, 0, ml_dtypes.finfo(BF16).min).astype(BF16)
MIXED = LOWEST.copy()
MIXED[..., ::3] = -np.inf

CASES: dict[str, tuple[Any, Any, bool, int]] = {
    # mask, positions, whether both are constant, calls of cuDNN
    "all": (None, None, True, 1),
    "causal": (None, CAUSAL, True, 1),
    "causal with a past": (None, LATER, True, 1),
    "rows without keys": (None, EARLIER, True, 1),
    "a sharded block that is hidden": (None, HIDDEN, True, 0),
    "another order": (None, PERMUTED, True, 1),
    "positions that are computed": (None, LATER, False, 1),
    "keys": (KEYS, None, False, 1),
    "keys, causal": (KEYS, LATER, True, 1),
    "keys and positions, computed": (KEYS, EARLIER, False, 1),
    "a causal mask": (np.tri(S, T, 3, dtype=bool)[None, None], None, True, 1),
    "a mask of zeros": (np.zeros((1, 1, S, T), np.float32), LATER, True, 1),
    "rows": (ROWS, None, True, 1),
    "rows, causal": (ROWS, LATER, True, 1),
    "added": (ADDED, None, False, 1),
    "added, the lowest": (LOWEST, LATER, False, 1),
    "added, causal": (ADDED, LATER, True, 1),
    "added, causal, computed": (ADDED, LATER, False, 1),
    "the lowest and infinite": (MIXED, None, False, 1),
    "the lowest and infinite, causal": (MIXED, LATER, True, 1),
    "the lowest and infinite, rows without keys": (MIXED, EARLIER, True, 1),
    "the lowest and infinite, computed": (MIXED, EARLIER, False, 1),
    "the lowest of bfloat16, causal": (BF16_LOWEST, LATER, True, 1),
    "the lowest of bfloat16, computed": (BF16_LOWEST, LATER, False, 1),
}


@dataclass
class Prepared:
    """One case, ready to be launched."""

    ins: list[Any]
    outs: list[np.ndarray]
    attrs: dict[str, Any]
    launch: launchers.Launch
    problems: list[cudnn.Problem]


def prepare(name: str, op: str, masked_row: str) -> Prepared:
    mask, positions, constant, _ = CASES[name]
    ins = [bshd(B, H, S, D), bshd(B, G, T, D), bshd(B, G, T, E), mask, *(positions or (None, None))]
    outs = [np.full((B, S, H, E), 7, BF16).swapaxes(1, 2)]
    if op == "AttentionBlock":
        outs += [np.full((B, H, S, 1), 7, np.float32) for _ in range(2)]
    attrs = {"scale": 0.3, "masked_row": masked_row}
    job = launchers.Job(
        op,
        attrs,
        tuple(None if x is None else OnDevice(x) for x in ins),
        tuple(map(OnDevice, outs)),
        (False, False, False, constant, constant, constant),
        {},
        launchers.Workspace(),
    )
    NumpyPlan.made = []
    launch = attention.attention(job)
    assert launch is not None
    return Prepared(ins, outs, attrs, launch, NumpyPlan.made)


ALL = [
    (name, op, masked_row)
    for name in CASES
    for op in ("Attention", "AttentionBlock")
    for masked_row in ("nan", "zero", "uniform")
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, Prepared]]:
    """All cases; their kernels are compiled together."""
    sources: list[Any] = []
    waiting: list[Any] = []
    library: list[cuda_on_host.Library] = []

    def bind(source: Any, prelude: str, ins: Any, outs: Any) -> Any:
        sources.append(source)
        pointers = [ins[n] if n >= 0 else outs[-1 - n] for n in source.arguments]

        def launch(stream: int) -> None:
            if library:
                library[0].launch(source, [raw.address(p) for p in pointers])
            else:
                waiting.append(launch)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, launchers):
            patch.setattr(module, "import_cupy", lambda: CUPY)
        patch.setattr(raw, "bind", bind)
        patch.setattr(attention, "_is_large", lambda job: True)
        patch.setattr(attention, "_MADE", {})
        patch.setattr(cudnn, "available", lambda: True)
        patch.setattr(cudnn, "plan", NumpyPlan)
        patch.setattr(cudnn, "takes", lambda problem, pointers: True)
        cases = {case: prepare(*case) for case in ALL}
        library.append(cuda_on_host.compiled(sources, tmp_path_factory.mktemp("attention"), PRELUDE))
        for launch in waiting:
            launch(0)
        yield cases


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_pieces_make_attention(case: tuple[str, str, str], prepared: dict[Any, Prepared]) -> None:
    name, op, _ = case
    mine = prepared[case]
    mine.launch(0)
    assert len(mine.problems) == CASES[name][3]
    types = tuple(TensorType(np.dtype(np.float32), x.shape) for x in mine.outs)
    ins = [x.astype(np.float32) if i < 3 else x for i, x in enumerate(mine.ins)]
    want = find(op)(Call(np, mine.attrs, types, {}), *ins)
    got = [x.astype(np.float32) for x in mine.outs]
    if op == "Attention":
        np.testing.assert_allclose(got[0], want, 1e-2, 1e-2)
        return
    np.testing.assert_allclose(got[0], want[0], 1e-2, 1e-2)
    with np.errstate(divide="ignore"):
        lse, expected = (m.clip(-1e30) + np.log(l) for _, m, l in (got, want))
    np.testing.assert_allclose(lse, expected, 1e-3, 1e-3)


def test_keys_that_no_query_sees_are_left_out(prepared: dict[Any, Prepared]) -> None:
    (problem,) = prepared["causal with a past", "Attention", "nan"].problems
    assert problem.k.shape[2] == S + 10
    assert problem.causal
    assert problem.bias is None


def test_a_mask_of_keys_needs_one_row_of_bias(prepared: dict[Any, Prepared]) -> None:
    (problem,) = prepared["keys, causal", "Attention", "zero"].problems
    assert problem.causal
    assert problem.bias is not None
    assert problem.bias.strides[2] == 0
