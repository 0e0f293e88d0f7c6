"""Read a model's own tensors one at a time, so that a large model never stands in memory whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError


def reader(tensors: Mapping[str, ir.TensorProtocol]) -> Callable[[str], np.ndarray]:
    """A function from an initialiser's name to its numbers. External data is read, not mapped: mapped pages count."""

    def fetch(name: str) -> np.ndarray:
        tensor = tensors[name]
        return _read(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()

    return fetch


def _read(tensor: ir.ExternalTensor) -> np.ndarray:
    dtype = tensor.dtype.numpy()
    if tensor.dtype.bitwidth < 8:
        return tensor.numpy()  # packed: let the library unpack it
    shape = tensor.shape.numpy()
    array = np.empty(shape, dtype)
    try:
        with open(Path(tensor.base_dir) / tensor.location, "rb", buffering=0) as file:
            file.seek(tensor.offset or 0)
            got = _fill(file, array.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise ModelError(
            f"tensor {tensor.name!r}: {tensor.location} cannot be read: {error.strerror}", code="OM1006"
        ) from error
    if got != prod(shape) * dtype.itemsize:
        raise ModelError(
            f"tensor {tensor.name!r}: {tensor.location} ends early", hint="is the file truncated?", code="OM1006"
        )
    return array


def _fill(file: object, view: memoryview) -> int:
    """Fill `view` from a file; the number of bytes that were there."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not got:
            break
        done += got
    return done
