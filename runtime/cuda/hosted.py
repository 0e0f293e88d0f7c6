"""What runs on the host beside a GPU: dtypes of which CuPy has no arrays, and ops that it cannot do.

Such values lie on the GPU as bytes. An instruction that touches one copies its inputs to the host, runs the NumPy
kernel there, and copies the results back: it costs a wait and two copies, and splits the CUDA graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.dtypes import is_for_hosts
from onnxmesh.runtime.kernels.registry import TensorType

_OBJECTS = "OSUTV"
"""NumPy's kinds of dtypes that hold no numbers; also ml_dtypes' own, bfloat16 among them."""


def is_foreign(kind: np.dtype) -> bool:
    """Whether CuPy has no arrays of a dtype: floats of 8 bits and less, integers of 2 and 4, strings."""
    return is_for_hosts(kind) or (kind.kind in _OBJECTS and kind.name != "bfloat16")


def storage(kind: np.dtype) -> np.dtype:
    """As what the elements of a dtype lie on a GPU: as they are, or else as unsigned integers of their size."""
    return np.dtype(f"u{kind.itemsize}") if is_foreign(kind) else kind


def to_host(value: Any, kind: np.dtype | None = None) -> Any:
    """A value in NumPy's arrays, of dtype `kind` if it is given; sequences item by item."""
    if value is None or isinstance(value, list):
        return value if value is None else [to_host(item) for item in value]
    array = value if isinstance(value, np.ndarray) else import_cupy().asnumpy(value)
    return array if kind is None or array.dtype == kind else array.view(kind)


def to_device(value: Any) -> Any:
    """A value in CuPy's arrays where CuPy has such: strings and foreign dtypes stay NumPy's."""
    if isinstance(value, list):
        return [to_device(item) for item in value]
    if not isinstance(value, np.ndarray | np.generic):
        return value  # there already, or None
    return value if is_foreign(value.dtype) else import_cupy().asarray(value)


def as_stored(array: np.ndarray) -> np.ndarray:
    """A host array as it lies on a GPU."""
    kind = storage(array.dtype)
    return array if kind == array.dtype else np.ascontiguousarray(array).view(kind)


def stored(result: Any, kind: TensorType, xp: Any) -> Any:
    """A host's result on the device, as it lies there.

    Raises:
        ValueError: it is not of the dtype and shape that the plan says.
    """
    array = np.asarray(result)
    if (array.dtype, array.shape) != (kind.dtype, kind.shape):
        raise ValueError(
            f"the result is {array.dtype}{list(array.shape)}, the plan says {kind.dtype}{list(kind.shape)}"
        )
    return xp.asarray(as_stored(np.ascontiguousarray(array)).reshape(kind.shape))
