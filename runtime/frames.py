"""Messages between processes: a JSON header, then the raw bytes of arrays. Nothing is unpickled.

A frame is the length of the header (4 bytes, big endian), the header, and the arrays that its field `arrays`
describes, one after another.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxmesh.runtime.dtypes import dtype

MAX_HEADER = 16 << 20
"""A header longer than this is refused: it does not come from one of ours."""

Header = dict[str, Any]
Arrays = dict[str, np.ndarray]


def send(to: socket.socket, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Send one frame. Raises OSError where the other side is gone."""
    own = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    described = [[name, array.dtype.name, list(array.shape)] for name, array in own.items()]
    text = json.dumps({**header, "arrays": described}).encode()
    to.sendall(struct.pack("!I", len(text)) + text)
    for array in own.values():
        to.sendall(array.reshape(-1).view(np.uint8).data)


def receive(source: socket.socket) -> tuple[Header, Arrays] | None:
    """The next frame; None where the other side has closed the connection.

    Raises ConnectionError for a frame that breaks off or is none.
    """
    first = source.recv(4)
    if not first:
        return None
    (length,) = struct.unpack("!I", first + bytes(_read(source, 4 - len(first))))
    if length > MAX_HEADER:
        raise ConnectionError(f"not a frame: a header of {length} bytes")
    try:
        header = json.loads(bytes(_read(source, length)))
        described = [(str(name), dtype(kind), tuple(map(int, shape))) for name, kind, shape in header.pop("arrays")]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConnectionError(f"not a frame: {error}") from error
    return header, {name: _array(source, kind, shape) for name, kind, shape in described}


def _array(source: socket.socket, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, kind)
    _read_into(source, array.reshape(-1).view(np.uint8).data)
    return array


def _read(source: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    _read_into(source, memoryview(data))
    return data


def _read_into(source: socket.socket, view: memoryview) -> None:
    while len(view):
        count = source.recv_into(view)
        if not count:
            raise ConnectionError("the connection broke off inside a frame")
        view = view[count:]
