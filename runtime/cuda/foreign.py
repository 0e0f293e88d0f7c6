"""Arrays and streams of other libraries (CuPy, torch, anything with DLPack or the CUDA array interface), as ours."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.errors import InvalidArgument
from onnxmesh.runtime.kernels.registry import Array

_CUDA, _MANAGED = 2, 13  # DLPack's numbers for memory of a GPU


def is_on_gpu(value: Any) -> bool:
    """Whether it is an array in a GPU's memory."""
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[0]) in (_CUDA, _MANAGED)
    return hasattr(value, "__cuda_array_interface__")


def as_array(value: Any) -> Array:
    """NumPy's or CuPy's array on the same memory; a list or a number becomes an array of the host.

    DLPack comes first: the CUDA array interface has no bfloat16. What is under way on the other library's current
    stream is waited for by CuPy's current stream.

    Raises:
        InvalidArgument: it cannot be shared, as a tensor that needs a gradient.
    """
    try:
        if not is_on_gpu(value):
            return np.asarray(value)
        cupy = import_cupy()
        if isinstance(value, cupy.ndarray):
            return value
        return cupy.from_dlpack(value) if hasattr(value, "__dlpack__") else cupy.asarray(value)
    except Exception as error:  # the other library's own
        raise InvalidArgument(f"the array cannot be shared: {' '.join(str(error).split())}", code="OM5009") from error


def as_host_array(value: Any) -> np.ndarray:
    """A NumPy array with the values of any array. Raises InvalidArgument as `as_array`."""
    array = as_array(value)
    return array if isinstance(array, np.ndarray) else np.asarray(import_cupy().asnumpy(array))


def stream_pointer(stream: Any) -> int:
    """The cudaStream_t of a stream: a number, CuPy's, torch's, or anything that has `__cuda_stream__`.

    Raises:
        InvalidArgument: it is none of these.
    """
    if isinstance(stream, int):
        return stream
    for name in ("ptr", "cuda_stream"):
        if isinstance(getattr(stream, name, None), int):
            return int(getattr(stream, name))
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    raise InvalidArgument(
        f"not a CUDA stream: {type(stream).__name__}", hint="pass CuPy's, torch's, or a pointer", code="OM5009"
    )
