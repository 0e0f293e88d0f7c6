"""Transforms, windows, filters and sequences: what ONNX's reference and SciPy compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.signal
from onnx import helper
from onnx.reference import ReferenceEvaluator
from test_kernels_onnx import Case, check, f, i64

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.runtime.kernels.registry import Call, TensorType, find


def transform(x: np.ndarray, axis: int, length: int, **flags: int) -> Case:
    return Case(
        "DFT", [x, i64(length).reshape(()), i64(axis).reshape(())], flags, drop=2,
        attrs={"axis": axis % x.ndim, "length": length}, reference=True,
    )  # fmt: skip


def frames(x: np.ndarray, step: int, window: np.ndarray | None, length: int, **flags: int) -> Case:
    scalars = [i64(n).reshape(()) for n in (step, length)]
    inputs = [x, scalars[0], window] if window is not None else [x, scalars[0], None, scalars[1]]
    attrs = {"frame_step": step, "frame_length": length}
    return Case("STFT", inputs, flags, drop=1 if window is not None else 3, attrs=attrs, opset=17, reference=True)


TRANSFORMS = [
    transform(f(2, 7, 1), 1, 7),
    transform(f(2, 7, 3, 2), 1, 7),
    transform(f(2, 7, 3, 2), -2, 3, inverse=1),
    transform(f(2, 8, 1), 1, 5),
    transform(f(2, 8, 2), 1, 12),
    transform(f(2, 9, 1), 1, 9, onesided=1),
    transform(f(2, 8, 1, dtype=np.float64), 1, 8, onesided=1),
    transform(f(2, 5, 2), 1, 8, onesided=1, inverse=1),
    frames(f(2, 24, 1), 4, None, 8),
    frames(f(2, 25, 1), 3, f(8), 8),
    frames(f(1, 24, 2), 5, f(7), 7, onesided=0),
]
SEQUENCES = [
    Case("Range", [np.array(x, dtype) for x in (1, 9, 2)], drop=1) for dtype in (np.int64, np.int32, np.float64)
] + [Case("Range", [np.array(x, np.float32) for x in (1.5, -4, -0.4)], drop=1)]


@pytest.mark.parametrize("case", [*TRANSFORMS, *SEQUENCES], ids=str)
def test_a_signal_kernel_agrees_with_onnx(case: Case) -> None:
    check(case, rtol=1e-4, atol=1e-5)


def made(op: str, shape: tuple[int, ...], dtype: Any = np.float32, *inputs: Any, **attrs: Any) -> np.ndarray:
    return find(op)(Call(np, attrs, (TensorType(np.dtype(dtype), shape),), {}), *inputs)


@pytest.mark.parametrize("periodic", [0, 1])
@pytest.mark.parametrize("op", ["HannWindow", "BlackmanWindow"])
def test_a_window_is_scipys(op: str, periodic: int) -> None:
    want = scipy.signal.get_window(op.removesuffix("Window").lower(), 33, fftbins=bool(periodic))
    np.testing.assert_allclose(made(op, (33,), periodic=periodic), want, atol=1e-7)


def test_a_hamming_window_has_onnxs_coefficients() -> None:
    want = scipy.signal.windows.general_hamming(33, 25 / 46, sym=True)
    np.testing.assert_allclose(made("HammingWindow", (33,), periodic=0), want, atol=1e-7)


@pytest.mark.parametrize(
    ("bands", "length", "rate", "low", "high"), [(8, 16, 8192, 0.0, 4096.0), (40, 513, 16000, 20.0, 7600.0)]
)
def test_mel_filters_are_those_of_onnx(bands: int, length: int, rate: int, low: float, high: float) -> None:
    inputs = [np.array(n, np.int64) for n in (bands, length, rate)] + [np.array(n, np.float32) for n in (low, high)]
    names = list("abcde")
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), ()) for n, x in zip(names, inputs)
    ]
    out = helper.make_tensor_value_info("y", 1, (length // 2 + 1, bands))
    model = helper.make_model(helper.make_graph([helper.make_node("MelWeightMatrix", names, ["y"])], "g", infos, [out]))
    (want,) = ReferenceEvaluator(model).run(None, dict(zip(names, inputs)))
    np.testing.assert_allclose(made("MelWeightMatrix", want.shape, np.float32, *inputs), want, atol=1e-6)


@pytest.mark.parametrize("k", [-5, -1, 0, 2])
def test_a_diagonal_of_ones(k: int) -> None:
    np.testing.assert_array_equal(made("EyeLike", (3, 5), np.int32, k=k), np.eye(3, 5, k, np.int32))
