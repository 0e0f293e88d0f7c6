"""Every elementwise op and reduction at every dtype that the standard allows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx.defs
import pytest
from test_kernels_onnx import OPSET, Case, check

from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    **{f"tensor({s}int{bits})": np.dtype(f"{s}int{bits}").type for s in ("", "u") for bits in (8, 16, 32, 64)},
}
REDUCTIONS = [f"Reduce{n}" for n in "Sum Mean Max Min Prod L1 L2 LogSum LogSumExp SumSquare".split()]
OTHERS = "Softmax LogSoftmax Hardmax ArgMax ArgMin TopK CumSum MatMul".split()
ATTRIBUTES: dict[str, list[dict[str, Any]]] = {
    "BitShift": [{"direction": "LEFT"}, {"direction": "RIGHT"}],
    "Mod": [{"fmod": 1}],
    "ArgMax": [{"axis": 1}, {"axis": 0, "select_last_index": 1, "keepdims": 0}],
    "Hardmax": [{"axis": 0}],
}
POSITIVE = {*"Log Sqrt Asin Acos Acosh Atanh Reciprocal ReduceLogSum ReduceLogSumExp Pow".split()}
ELSEWHERE = {"Fused", "Cast", "CastLike", "Where", "Gelu"}
"""Ops with tests of their own, and those whose dtypes do not follow from the first input."""


def numbers(op: str, dtype: Any, *, divisor: bool = False) -> np.ndarray:
    rng = np.random.default_rng(len(op) + divisor)
    if dtype is np.bool_:
        return rng.random((3, 4)) < 0.5
    if np.dtype(dtype).kind in "iu":
        x = rng.integers(0 if np.dtype(dtype).kind == "u" else -5, 6, (3, 4)).astype(dtype)
        return np.abs(x) | dtype(1) if divisor or op in POSITIVE else x
    x = rng.standard_normal((3, 4)) * 2
    x = np.abs(x) / 8 + (1 if op == "Acosh" else 0.1) if divisor or op in POSITIVE else x
    return x.astype(dtype)


def cases(op: str) -> Iterator[Case]:
    schema = onnx.defs.get_schema(op, OPSET)
    constraint = next(c for c in schema.type_constraints if c.type_param_str == schema.inputs[0].type_str)
    for dtype in (DTYPES[name] for name in constraint.allowed_type_strs if name in DTYPES):
        if "Log" in op and np.dtype(dtype).kind in "iu":
            continue  # the reference has no logarithm of integers
        x = numbers(op, dtype)
        more: list[Any] = [numbers(op, dtype, divisor=True)] * (schema.min_input - 1)
        for attrs in ATTRIBUTES.get(op, [{}]):
            if op in REDUCTIONS:
                yield Case(op, [x, np.array([1])], attrs, drop=1, attrs={"axes": [1]})
            elif op == "CumSum":
                yield Case(op, [x, np.array(1)], attrs, drop=1, attrs={"axis": 1})
            elif op == "TopK":
                yield Case(op, [x, np.array([2])], attrs, drop=1, attrs={"k": 2}, outputs=2)
            elif op == "MatMul":
                yield Case(op, [x, x.T.copy()], attrs)
            else:
                yield Case(op, [x, *more], attrs)


@pytest.mark.parametrize("op", sorted({*ELEMENTWISE, *REDUCTIONS, *OTHERS} - ELSEWHERE))
def test_every_dtype_of_the_standard(op: str) -> None:
    for case in cases(op):
        rough = case.inputs[0] is not None and case.inputs[0].dtype == np.float16
        check(case, *((5e-3, 2e-3) if rough else (2e-5, 2e-6)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.uint64])
@pytest.mark.parametrize("bounds", [(None, None), (1, None), (None, 3), (1, 3), (3, 1)])
def test_clip_with_bounds_that_may_be_absent(dtype: Any, bounds: tuple[int | None, int | None]) -> None:
    low, high = (None if b is None else np.array(b, dtype) for b in bounds)
    x = np.arange(6).astype(dtype)
    check(Case("Clip", [x, low, high]))
