"""The interface of onnx.backend, over the ordinary `compile` and `Session`.

    from onnxmesh import backend

    rep = backend.prepare(model, "CPU:4")
    outputs = rep.run([x, axes])

`python -m onnxmesh.backend --report` runs the test suite of the standard through it (docs/backend.md).
"""

from __future__ import annotations

from onnxmesh.backend.interface import is_compatible, prepare, run_model, run_node, supports_device
from onnxmesh.backend.rep import Rep

__all__ = ["Rep", "is_compatible", "prepare", "run_model", "run_node", "supports_device"]
