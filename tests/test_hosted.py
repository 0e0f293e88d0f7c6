"""How a GPU keeps what CuPy has no arrays of, as far as that needs no GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime import dtypes
from onnxmesh.runtime.cuda import hosted
from onnxmesh.runtime.kernels.registry import TensorType

FOREIGN = (
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn"),
    *("int2", "uint2", "int4", "uint4"),
)
OWN = (
    "bool",
    "int8",
    "uint8",
    "int64",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_cupy_has_no_arrays_of_is_kept_as_bytes(name: str) -> None:
    kind = dtypes.dtype(name)
    assert hosted.is_foreign(kind)
    assert hosted.storage(kind) == np.uint8
    array = np.array([1, 1, 0.5, 1]).astype(kind)
    stored = hosted.as_stored(array)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(hosted.to_host(stored, kind), array)


@pytest.mark.parametrize("name", OWN)
def test_what_cupy_has_stays_as_it_is(name: str) -> None:
    kind = dtypes.dtype(name)
    assert not hosted.is_foreign(kind)
    assert hosted.storage(kind) == kind


def test_strings_and_sequences_of_foreign_arrays_stay_on_the_host() -> None:
    text, eight = np.array(["a", "b"], object), np.ones(2, ml_dtypes.float8_e5m2)
    assert hosted.to_device(text) is text
    assert hosted.to_device([eight, None])[0] is eight
    assert hosted.to_host([text, None]) == [text, None]


def test_a_result_of_the_host_must_be_what_the_plan_says() -> None:
    kind = TensorType(np.dtype(ml_dtypes.int4), (2, 1))
    stored = hosted.stored(np.array([[1], [-2]], ml_dtypes.int4), kind, np)
    assert (stored.dtype, stored.shape) == (np.uint8, (2, 1))
    with pytest.raises(ValueError, match=r"the result is int4\[2\], the plan says int4\[2, 1\]"):
        hosted.stored(np.ones(2, ml_dtypes.int4), kind, np)
