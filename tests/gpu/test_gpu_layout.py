"""The specification of the layout once more, on a GPU: every program there gives its numbers with strided buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import test_layout
from test_layout import *  # noqa: F403

from onnxmesh.runtime.host import LoneCommunicator
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Program

for _name in ("test_the_copies_that_remain", "test_keys_are_gathered_before_they_are_transposed"):
    globals().pop(_name)  # these run nothing


class OnTheGpu:
    """An engine on the first GPU, with host arrays in and out."""

    def __init__(self, program: Program, weights: Sequence[np.ndarray]) -> None:
        from onnxmesh.runtime.cuda.device import CudaDevice

        self.device = CudaDevice()
        self.engine = self.device.engine(program, weights, LoneCommunicator(Mesh.of(), 0), None)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The third run's outputs: the last two are replays of a CUDA graph."""
        with self.device.scope():
            for _ in range(3):
                found = self.engine.run([np.array(x) for x in inputs])
            return [self.device.get(x) for x in found]


@pytest.fixture(autouse=True)
def on_the_gpu(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are on a GPU; products and sums may be rounded otherwise."""
    gpus(1)
    monkeypatch.setattr(test_layout, "Engine", OnTheGpu)
    monkeypatch.setattr(np.testing, "assert_array_equal", lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4))
