"""What the ranks of a session hold of a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from onnxmesh.runtime.dtypes import is_narrow
from onnxmesh.runtime.session import Session
from onnxmesh.runtime.views import join_views
from onnxmesh.verification.correspondence import Tensor

DAY = 86400.0
"""Seconds that ranks wait for each other: as long as comparing takes."""

_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD."""


def give_back_at_once() -> None:
    """Have this process return the memory of large arrays as they are freed, where it has glibc's allocator.

    That would keep them for later, and count them: its threshold grows with what is freed (mallopt(3)).
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def held(session: Session, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """What every rank holds, in its own memory where that is the host's."""
    for rank, engine in session.engines.items():
        yield rank, session.device.get(engine.array(tensor.buffer))


def pieces(session: Session, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """What every rank holds; where ranks hold shares of a sum, their sum in float32, of the first of them."""
    own = dict(held(session, tensor))
    if not tensor.partial_axes:
        yield from own.items()
        return
    mesh = session.plan.mesh
    shares = tuple((axis, placement) for axis, placement in tensor.spec if axis in tensor.partial_axes)
    wide = {rank: x.astype(np.float32) if is_narrow(x.dtype) else x for rank, x in own.items()}
    for rank in own:
        if rank == mesh.group(rank, tensor.partial_axes)[0]:
            yield rank, join_views(wide, shares, mesh, rank)


def whole(session: Session, tensor: Tensor) -> np.ndarray:
    """The tensor, put together; the memory of a rank itself where that holds all of it."""
    own = dict(held(session, tensor))
    return own[0] if tensor.is_whole else join_views(own, tensor.spec, session.plan.mesh)
