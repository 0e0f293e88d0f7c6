"""The CUDA text of attention, run on a CPU, against the NumPy kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cuda_on_host

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.runtime.cuda.attention_text import INPUTS, OUTPUTS, PRELUDE, Attention
from onnxmesh.runtime.cuda.codegen.operand import Operand
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="needs g++")
RNG = np.random.default_rng(3)
BF16 = np.dtype(ml_dtypes.bfloat16)


def case(
    b: int = 1,
    h: int = 4,
    g: int = 2,
    s: int = 5,
    t: int = 70,
    d: int = 12,
    e: int = 20,
    dtype: Any = np.float32,
    mask: Any = None,
    positions: tuple[Any, Any] | None = None,
    block: bool = False,
    processors: int = 1,
    swapped: bool = False,
    **attrs: Any,
) -> dict[str, Any]:
    """Operands of one attention; `swapped`: memory in the order [b, s, h, d]."""

    def tensor(*shape: int) -> np.ndarray:
        if swapped:
            shape = (shape[0], shape[2], shape[1], shape[3])
        array = RNG.standard_normal(shape).astype(dtype)
        return array.swapaxes(1, 2) if swapped else array

    arrays: dict[str, Any] = {"q": tensor(b, h, s, d), "k": tensor(b, g, t, d), "v": tensor(b, g, t, e)}
    if mask is not None:
        arrays["mask"] = mask
    if positions is not None:
        arrays["q_pos"], arrays["k_pos"] = (np.asarray(p, np.int64) for p in positions)
    arrays["o"] = tensor(b, h, s, e)
    if block:
        arrays["m"], arrays["l"] = (np.empty((b, h, s, 1), np.float32) for _ in range(2))
    return {"arrays": arrays, "attrs": attrs, "block": block, "processors": processors}


def mask(*shape: int, share: float = 0.7) -> np.ndarray:
    return RNG.random(shape) < share


def additive(*shape: int) -> np.ndarray:
    return np.where(mask(*shape), RNG.standard_normal(shape), -np.inf).astype(np.float32)


def hidden_row(lowest: Any, dtype: Any = np.float32) -> np.ndarray:
    """An additive mask that hides all keys from row 1."""
    return np.where(np.arange(5)[:, None] == 1, lowest, np.zeros((1, 1, 5, 70))).astype(dtype)


CAUSAL = (np.arange(5) + 60, np.arange(70))
EMPTY = (np.arange(5) - 2, np.arange(70))
CASES: dict[str, dict[str, Any]] = {
    "plain": case(),
    "strides": case(b=2, swapped=True),
    "many rows": case(b=1, h=3, g=3, s=130, t=33, d=40, e=72),
    "wide heads": case(h=2, g=1, s=3, t=40, d=300, e=520),
    "bf16": case(dtype=BF16, scale=0.2),
    "fp16 scores rounded": case(dtype=np.float16, qk_dtype="float16"),
    "float64": case(dtype=np.float64, s=40),
    "softcap": case(softcap=2.0),
    "causal": case(positions=CAUSAL),
    "empty rows nan": case(positions=EMPTY),
    "empty rows zero": case(positions=EMPTY, masked_row="zero"),
    "empty rows uniform": case(positions=EMPTY, masked_row="uniform"),
    "mask": case(b=2, mask=mask(2, 1, 5, 70)),
    "mask of keys": case(b=2, mask=mask(2, 1, 1, 70), positions=CAUSAL),
    "mask of heads": case(mask=mask(1, 4, 5, 70), masked_row="uniform"),
    "additive": case(mask=additive(1, 4, 5, 70)),
    "additive, all hidden": case(mask=np.full((1, 1, 1, 70), -np.inf, np.float32), masked_row="zero"),
    "additive, the lowest": case(dtype=BF16, mask=np.full((1, 1, 5, 70), np.finfo(np.float32).min).astype(BF16)),
    "additive, infinite, uniform": case(mask=hidden_row(-np.inf), positions=CAUSAL, masked_row="uniform", block=True),
    "additive, the lowest of bf16, uniform": case(
        mask=hidden_row(ml_dtypes.finfo(BF16).min, BF16), positions=CAUSAL, masked_row="uniform", block=True
    ),
    "block": case(block=True, positions=EMPTY),
    "block uniform": case(block=True, positions=EMPTY, masked_row="uniform"),
    "split": case(s=1, t=700, processors=64),
    "split block": case(b=2, s=2, t=600, processors=64, block=True, positions=(np.array([-1, 599]), np.arange(600))),
    "one key": case(s=1, t=1, h=8, g=8),
    "no keys": case(t=0, masked_row="zero"),
}


def description(given: dict[str, Any]) -> Attention:
    operands = {name: Operand.of(array) for name, array in given["arrays"].items()}
    return Attention(operands, given["attrs"], given["block"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda_on_host.Library:
    sources = [s for given in CASES.values() for s in description(given).sources(given["processors"])[0]]
    return cuda_on_host.compiled(sources, tmp_path_factory.mktemp("attention"), PRELUDE)


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_attention(name: str, library: cuda_on_host.Library) -> None:
    given = CASES[name]
    arrays = dict(given["arrays"])
    sources, nbytes = description(given).sources(given["processors"])
    arrays["scratch"] = np.full(max(nbytes, 8), 0xFF, np.uint8)
    assert (len(sources) == 2) == name.startswith("split")
    nothing = np.zeros(1)
    ins = [arrays.get(x, nothing) for x in INPUTS]
    outs = [arrays.get(x, nothing) for x in OUTPUTS]
    for source in sources:
        library.launch(source, [(ins[n] if n >= 0 else outs[-1 - n]).ctypes.data for n in source.arguments])
    names = ("o", "m", "l") if given["block"] else ("o",)
    types = tuple(TensorType(np.dtype(np.float64 if x == "o" else np.float32), arrays[x].shape) for x in names)
    call = Call(np, given["attrs"], types, {})
    want = find("AttentionBlock" if given["block"] else "Attention")(call, *(arrays.get(x) for x in INPUTS))
    narrow = {np.dtype(np.float16): 2e-3, BF16: 1e-2}.get(arrays["q"].dtype, 2e-5)
    for x, expected in zip(names, want if given["block"] else (want,)):
        np.testing.assert_allclose(arrays[x].astype(np.float64), expected, narrow, narrow)
