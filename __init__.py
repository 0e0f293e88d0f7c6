"""onnxmesh: compile a plain ONNX file into a sharded engine for many devices.

    plan = onnxmesh.compile("model.onnx", tp=2, cp=2)
    plan.save("model.plan")
    with onnxmesh.Session("model.plan") as session:
        outputs = session.run(None, {"x": x})

Names are imported at first use, so that a rank which only runs a plan never loads the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxmesh.compiler.api import compile
    from onnxmesh.compiler.choose import estimate
    from onnxmesh.runtime.errors import OnnxMeshError
    from onnxmesh.runtime.mesh import Mesh
    from onnxmesh.runtime.plan import Plan
    from onnxmesh.runtime.serialize import load
    from onnxmesh.runtime.session import Session

_HOME = {
    "compile": "onnxmesh.compiler.api",
    "estimate": "onnxmesh.compiler.choose",
    "OnnxMeshError": "onnxmesh.runtime.errors",
    "Mesh": "onnxmesh.runtime.mesh",
    "Plan": "onnxmesh.runtime.plan",
    "load": "onnxmesh.runtime.serialize",
    "Session": "onnxmesh.runtime.session",
}

__all__ = ["Mesh", "OnnxMeshError", "Plan", "Session", "compile", "estimate", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'onnxmesh' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
