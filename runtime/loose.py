"""Loose values: what a program passes on without a static tensor type.

Tensors whose dims depend on data, tensors of strings, sequences (lists of arrays) and optionals (None, or what they may
hold). A plan writes the type of one as ONNX Runtime does: `tensor(int64)`, `seq(tensor(float))`,
`optional(seq(tensor(float)))`. Its shape there is what is known when compiling: -1 for a dim that is not, and no dims
where not even their number is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxmesh.runtime.dtypes import from_ort, ort_type

if TYPE_CHECKING:
    from onnxmesh.runtime.plan import Port

STRINGS = "tensor(string)"
_NESTED = re.compile(r"(seq|optional|tensor)\((.*)\)")


def is_loose(kind: str) -> bool:
    """Whether the dtype of a buffer or a port is the type of a loose value; else it is the name of a dtype."""
    return "(" in kind


def check_type(kind: str) -> None:
    """Raise ValueError unless this is the type of a loose value."""
    outer, inner = _parts(kind)
    if outer != "tensor":
        check_type(inner)
    elif kind != STRINGS:
        from_ort(inner)


def element_dtype(kind: str) -> np.dtype | None:
    """The dtype of a loose tensor's elements, `object` for strings; None for what is no tensor.

    Raises:
        ValueError: there is no such type.
    """
    outer, inner = _parts(kind)
    if outer != "tensor":
        return None
    return np.dtype(object) if kind == STRINGS else from_ort(inner)


def checked(value: Any, kind: str, shape: Sequence[int] = ()) -> Any:
    """`value` as a program takes it: arrays of NumPy, those of strings with dtype object; lists; None.

    Raises:
        ValueError: it is not of the type `kind`, or its dims contradict `shape`.
    """
    outer, inner = _parts(kind)
    if outer == "optional":
        return None if value is None else checked(value, inner)
    if outer == "seq":
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list for {kind}, got {describe(value)}")
        return [checked(item, inner) for item in value]
    array = np.asarray(value)
    if kind == STRINGS:
        array = array.astype(object) if array.dtype.kind in "UST" else array
    expected = element_dtype(kind)
    fits = not shape or (len(shape) == array.ndim and all(a in (-1, b) for a, b in zip(shape, array.shape)))
    if value is None or array.dtype != expected or not fits:
        raise ValueError(f"expected {kind}{dims(shape)}, got {describe(value)}")
    return array


def describe(value: Any) -> str:
    """The type of a value, for messages."""
    if isinstance(value, list | tuple):
        return f"seq of {len(value)}"
    if value is None:
        return "nothing"
    kind = getattr(value, "dtype", None)
    return type(value).__name__ if kind is None else f"{'string' if kind.kind == 'O' else kind}{list(value.shape)}"


def dims(shape: Sequence[int]) -> str:
    """What is known of a shape, for messages; empty where nothing is."""
    return f"[{', '.join('?' if size < 0 else str(size) for size in shape)}]" if shape else ""


def to_files(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays by which files hold values: a sequence as NAME.0, NAME.1, ..., strings as NumPy's, None as nothing."""
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        if isinstance(value, list):
            found |= to_files({f"{name}.{i}": item for i, item in enumerate(value)})
        elif value is not None:
            array = np.asarray(value)
            found[name] = array.astype(str) if array.dtype.kind == "O" else array
    return found


def from_files(arrays: Mapping[str, np.ndarray], ports: Sequence[Port]) -> dict[str, Any]:
    """The values that files hold as `to_files` writes them; `ports` are those of loose values."""
    found: dict[str, Any] = dict(arrays)
    for port in ports:
        if port.name in found:
            continue
        items = [found.pop(name) for i in range(len(arrays)) if (name := f"{port.name}.{i}") in found]
        if items or port.dtype.startswith("seq("):
            found[port.name] = items
        elif port.dtype.startswith("optional("):
            found[port.name] = None
    return found


def tensor_type(name: str) -> str:
    """The type of a loose tensor of a dtype given by name, `object` for strings."""
    return STRINGS if name == "object" else ort_type(name)


def _parts(kind: str) -> tuple[str, str]:
    """(`seq`, `tensor(float)`) of `seq(tensor(float))`."""
    match = _NESTED.fullmatch(kind)
    if match is None:
        raise ValueError(f"unknown type {kind!r}")
    return match[1], match[2]
