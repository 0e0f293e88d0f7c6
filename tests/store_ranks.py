"""Ranks as processes that send everything through their store: slow, and enough to disturb them without GPUs."""

from __future__ import annotations

import base64
from collections.abc import Collection

import numpy as np

from onnxmesh.runtime.comm import Call, Parcels
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.host import HostCommunicator
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.rendezvous import Store, World


class StoreCommunicator(HostCommunicator):
    """The collectives on the CPU between the ranks of a world."""

    def __init__(self, mesh: Mesh, world: World) -> None:
        super().__init__(mesh, world.rank)
        assert world.store is not None
        self._store: Store = world.store

    def exchange(self, call: Call, parcels: Parcels, sources: Collection[int]) -> Parcels:
        here = call.group.index(self.rank)
        for to, parcel in parcels.items():
            if to != here:
                data = base64.b64encode(np.ascontiguousarray(parcel).view(np.uint8)).decode()
                self._store.set(f"{call}/{here}-{to}", f"{' '.join(map(str, parcel.shape))}/{data}")
        return {i: parcels[here] if i == here else self._receive(call, i, here) for i in sources}

    def close(self) -> None:
        return None

    def abort(self, error: BaseException) -> None:
        self._store.fail(error)

    def _receive(self, call: Call, source: int, here: int) -> np.ndarray:
        text = self._store.get(f"{call}/{source}-{here}", f"rank {call.group[source]}")
        shape, _, data = text.partition("/")
        return np.frombuffer(base64.b64decode(data), dtype(call.dtype)).reshape([int(size) for size in shape.split()])
