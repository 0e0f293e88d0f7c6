"""The tests of ops over spatial dims once more, through sessions on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import test_kernels_spatial
from test_kernels_spatial import test_a_node_computes_what_onnx_says  # noqa: F401

from onnxmesh.runtime.session import Session


@pytest.fixture(autouse=True)
def on_the_gpu(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every session is one on a GPU."""
    gpus(1)
    monkeypatch.setattr(test_kernels_spatial, "Session", partial(Session, device="cuda"))
