"""The global view of a tensor and the pieces that ranks hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxmesh.runtime.collectives import all_gather
from onnxmesh.runtime.comm import Array, Communicator
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial, Replicate, Shard, cut, join
from onnxmesh.runtime.plan import Spec


def cut_view(array: Array, spec: Spec, mesh: Mesh, rank: int, xp: Any) -> Array:
    """A rank's piece of the global `array`, NumPy's or one of `xp`: a view where it can be."""
    namespace, coordinate = np if isinstance(array, np.ndarray) else xp, mesh.coordinate(rank)
    for axis, placement in spec:
        if mesh.axis_size(axis) > 1:
            array = cut(array, placement, mesh.axis_size(axis), coordinate[axis], namespace)
    return array


def join_views(pieces: Mapping[int, np.ndarray], spec: Spec, mesh: Mesh, rank: int = 0) -> np.ndarray:
    """The global tensor from the pieces by rank: undoes the cuts, the last axis's first."""
    if not spec:
        return pieces[rank]
    (axis, placement), rest = spec[0], spec[1:]
    if isinstance(placement, Replicate):
        return join_views(pieces, rest, mesh, rank)
    parts = [join_views(pieces, rest, mesh, other) for other in mesh.group(rank, axis)]
    return join(parts, placement, np)


def gather_views(x: Array, spec: Spec, comm: Communicator, xp: Any) -> Array:
    """The same by sending: every rank gives its piece, and gets the global tensor."""
    for axis, placement in reversed(spec):
        if isinstance(placement, Shard):
            x = all_gather(x, axis, placement, comm, xp)
        elif isinstance(placement, Partial):
            x = comm.all_reduce(x, axis, placement.op)
    return x
