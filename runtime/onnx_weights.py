"""Initialisers of an ONNX file, read one at a time: the source reader behind recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from onnxmesh.runtime.errors import PlanError

_PACKED = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}
"""Bits of an element of the dtypes that files pack."""


def onnx_fetch(model_path: str | Path) -> Callable[[str], np.ndarray]:
    """A function that reads an initialiser of the model by name: its value, in memory of its own.

    External data is read slice by slice from its files, which must lie in the model's folder. `onnx` is
    imported only here.

    Raises:
        PlanError: the model cannot be read. The function raises it for an unknown name, for data that lies
            outside of the folder, and for data that does not fit the declared shape.
    """
    import onnx

    path = Path(model_path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors share no base class
        raise PlanError(f"{path}: not a readable ONNX model: {error}", code="OM4103") from error
    tensors = {
        **_within(model.graph),
        **{tensor.name: tensor for tensor in model.graph.initializer},
        **_constants(model.graph),
    }

    def fetch(name: str) -> np.ndarray:
        if name not in tensors:
            raise PlanError(
                f"{path}: has no initialiser {name!r}", hint="is it the model that was compiled?", code="OM4101"
            )
        return _read(tensors[name], path)

    return fetch


def _within(graph: Any) -> dict[str, Any]:
    """The initialisers of the graphs that control flow holds, those of whose names there is one only."""
    waiting, tensors = [graph], []
    while waiting:
        for attribute in (a for node in waiting.pop().node for a in node.attribute if a.HasField("g")):
            waiting.append(attribute.g)
            tensors += attribute.g.initializer
    names = Counter(tensor.name for tensor in tensors)
    return {tensor.name: tensor for tensor in tensors if names[tensor.name] == 1}


def _constants(graph: Any) -> dict[str, Any]:
    """The tensors of Constant nodes, by the name of their output."""
    return {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }


def _read(tensor: Any, model_path: Path) -> np.ndarray:
    from onnx import TensorProto, numpy_helper

    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    path = _inside(model_path.resolve().parent, where.get("location", ""), tensor.name)
    return _read_slice(tensor, path, int(where.get("offset", 0)), where.get("length"))


def _inside(folder: Path, location: str, name: str) -> Path:
    path = (folder / location).resolve()
    if not location or not path.is_relative_to(folder):
        raise PlanError(
            f"initialiser {name!r}: external data {location!r} lies outside of the model's folder", code="OM4103"
        )
    return path


def _read_slice(tensor: Any, path: Path, offset: int, length: str | None) -> np.ndarray:
    from onnx import helper

    kind, shape = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims)
    bits = _PACKED.get(kind.name)
    array = np.empty(-(-prod(shape) * bits // 8), np.uint8) if bits else np.empty(shape, kind)
    view = array.reshape(-1).view(np.uint8).data
    if length is not None and int(length) != len(view):
        raise PlanError(
            f"initialiser {tensor.name!r}: {length} bytes of external data for {kind}{list(shape)}", code="OM4103"
        )
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise PlanError(f"initialiser {tensor.name!r}: {path} ends too early", code="OM4103")
                view = view[count:]
    except OSError as error:
        raise PlanError(
            f"initialiser {tensor.name!r}: {path} cannot be read: {error.strerror}", code="OM4103"
        ) from error
    return _unpacked(array, bits, kind, shape) if bits else array


def _unpacked(data: np.ndarray, bits: int, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of `bits` bits in `data`, lowest bits first, a byte each."""
    numbers = (data[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8((1 << bits) - 1)
    return numbers.reshape(-1)[: prod(shape)].reshape(shape).view(kind)
