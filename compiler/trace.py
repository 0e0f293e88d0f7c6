"""Which values of the model a program holds, where and from when on: what lets a run be compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from onnxmesh.compiler.ir.loose import is_loose
from onnxmesh.compiler.ir.view import shape_of
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import to_json

_STORED = "stored"


def stored(value: ir.Value, buffer: int, ready: int) -> None:
    """Note that `buffer` holds a value once the instruction `ready` has run."""
    value.meta[_STORED] = buffer, ready


def trace(graph: ir.Graph, mesh: Mesh) -> list[dict[str, Any]]:
    """The values of a graph that was lowered which may be the model's own, in the order in which they are ready.

    A value is one of the model's if the model has its name. Names that the compiler makes up are left out where they
    can be told: the value has no global view, or no placement on each axis of several ranks.
    """
    axes = {axis for axis, size in mesh.axes if size > 1}
    found = [entry for node in graph for value in node.outputs for entry in _entries(value, axes)]
    return sorted(found, key=lambda entry: entry["ready"])


def _entries(value: ir.Value, axes: set[str]) -> Iterator[dict[str, Any]]:
    name = str(value.meta.get("global_name", value.name))
    spec = value.meta.get("spec", ())
    known = "global_name" in value.meta and axes <= {axis for axis, _ in spec} if axes else "~" not in name
    if _STORED not in value.meta or is_loose(value) or not known:
        return
    buffer, ready = value.meta[_STORED]
    yield {
        "name": name,
        "buffer": buffer,
        "ready": ready,
        "shape": list(map(int, value.meta.get("global_shape", shape_of(value)))),
        "placement": {axis: to_json(placement) for axis, placement in spec},
    }
