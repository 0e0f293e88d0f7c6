"""Safetensors files: written tensor by tensor, read tensor by tensor, checked byte by byte.

A file is 8 bytes of header length, the header (JSON, padded with spaces to a multiple of 8) and the tensors'
bytes, one after another. The package `safetensors` reads these files; it is not used here because its NumPy
side knows no bfloat16 and float8, and holds whole files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.errors import PlanError

_CODES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "C64": "complex64"},
}
_AS_BYTES = {
    **{"int4": "I8", "int2": "I8", "uint4": "U8", "uint2": "U8"},
    **dict.fromkeys(("float4_e2m1fn", "float8_e4m3fnuz", "float8_e5m2fnuz"), "U8"),
}
"""Dtypes that safetensors files have no word for, of a byte an element; the plan knows what they are."""
_CODE_OF = {**{name: code for code, name in _CODES.items()}, **_AS_BYTES}
_MAX_HEADER = 100_000_000  # as in the safetensors package
_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file declares of one tensor; `start` counts from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return prod(self.shape) * dtype(self.dtype).itemsize


def header(entries: Iterable[Entry]) -> bytes:
    """The first bytes of a file that holds `entries` in this order: equal entries give equal bytes.

    Raises:
        PlanError: a dtype that safetensors has no code for, or a name that appears twice.
    """
    fields: dict[str, Any] = {}
    offset = 0
    for entry in entries:
        if entry.dtype not in _CODE_OF:
            raise PlanError(f"weight {entry.name!r}: safetensors files cannot hold {entry.dtype}", code="OM4009")
        if entry.name in fields or entry.name == "__metadata__":
            raise PlanError(f"two weights are called {entry.name!r}", code="OM4009")
        fields[entry.name] = {
            "dtype": _CODE_OF[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def digest(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in row-major order."""
    return hashlib.sha256(_bytes_of(array)).hexdigest()


class ShardWriter:
    """Writes one file, tensor by tensor, in the order of the entries.

    The file is open only while something is written, so any number of writers can be at work.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path = path
        self._left = list(reversed(entries))
        path.write_bytes(header(entries))

    def append(self, name: str, array: np.ndarray) -> str:
        """Write the next tensor and return the SHA-256 of its bytes.

        Raises ValueError unless name, dtype and shape are those of the next entry.
        """
        given = Entry(name, array.dtype.name, tuple(array.shape))
        if not self._left or self._left[-1] != given:
            raise ValueError(f"{self.path.name}: expected {self._left[-1:]}, got {given}")
        self._left.pop()
        data = _bytes_of(array)
        with self.path.open("ab") as file:
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    def close(self) -> None:
        """Raise ValueError unless every tensor has been written."""
        if self._left:
            raise ValueError(f"{self.path.name}: {self._left[-1].name!r} was never written")


class ShardFile:
    """Reads a safetensors file; checks its header strictly. Use it in a `with`.

    Raises:
        PlanError: the file cannot be read or is not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}", code="OM4012") from error
        try:
            self.header = self._read_header()
            self.entries = self._entries()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, in memory of its own; where the file has no word for its dtype as bytes."""
        if name not in self.entries:
            raise PlanError(f"{self.path}: holds no tensor {name!r}", code="OM4012")
        entry = self.entries[name]
        array = np.empty(entry.shape, dtype(entry.dtype))
        self.read_into(name, _bytes_of(array))
        return array

    def read_into(self, name: str, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes of the tensor `name`, from its byte `start` on. Threads may do so at once.

        Raises:
            PlanError: the file has become shorter, or cannot be read.
        """
        place = len(self.header) + self.entries[name].start + start
        while len(view):
            try:
                count = os.preadv(self._file.fileno(), [view[:_CHUNK]], place)
            except OSError as error:
                raise PlanError(f"{self.path}: cannot be read: {error.strerror}", code="OM4012") from error
            if not count:
                raise PlanError(f"{self.path}: ends too early", code="OM4012")
            view, place = view[count:], place + count

    def close(self) -> None:
        """Close the file. May be called again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> bytes:
        size = self.path.stat().st_size
        first = self._file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(_MAX_HEADER, size - 8):
            raise PlanError(
                f"{self.path}: not a safetensors file: header of {length} bytes, file of {size}", code="OM4012"
            )
        return first + self._file.read(length)

    def _entries(self) -> Mapping[str, Entry]:
        try:
            fields = json.loads(self.header[8:], object_pairs_hook=_unique)
            if not isinstance(fields, dict):
                raise ValueError("the header is no object")
            fields.pop("__metadata__", None)
            entries = [_entry(name, field) for name, field in fields.items()]
            _check_layout(entries, self.path.stat().st_size - len(self.header))
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{self.path}: not a safetensors file: {error}", code="OM4012") from error
        return {entry.name: entry for entry in entries}


def _bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of the array, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _entry(name: str, field: Any) -> Entry:
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: wrong fields")
    code, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(code, str) or code not in _CODES:
        raise ValueError(f"tensor {name!r}: unknown dtype {code!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: wrong shape or offsets")
    entry = Entry(name, _CODES[code], tuple(shape), offsets[0])
    if entry.start + entry.nbytes != offsets[1]:
        raise ValueError(f"tensor {name!r}: {entry.nbytes} bytes by its shape, not so by its offsets")
    return entry


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(entries: Iterable[Entry], size: int) -> None:
    """Raise ValueError unless the tensors lie one after another and fill the file."""
    end = 0
    for entry in sorted(entries, key=lambda e: (e.start, e.nbytes)):
        if entry.start != end:
            raise ValueError(f"tensor {entry.name!r} starts at {entry.start}, not at {end}")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"{size} bytes of tensors, {end} declared")
