"""A prepared model: compiled for the shapes and deciding values that it is given, when it is given them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import onnx
import onnx_ir as ir
from onnx.backend.base import BackendRep

from onnxmesh.backend.devices import Target
from onnxmesh.compiler import frontend
from onnxmesh.compiler.api import ModelLike, compile_model
from onnxmesh.compiler.options import Options
from onnxmesh.passes.graph.deciding import deciding_inputs
from onnxmesh.runtime.errors import InvalidArgument
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.session import Session

KEPT = 4
"""So many sessions, for the last shapes and values, stay open."""


class Rep(BackendRep):  # type: ignore[misc]  # onnx has no types
    """A model on a device. Use it in a `with`, or close it.

    Its first run with inputs of new shapes, or with new values of inputs that decide shapes (axes, sizes, counts),
    compiles a plan for them.

    Attributes:
        inputs: the names of the inputs to give: those of the graph that no initialiser fills.

    Raises:
        ModelError: the model cannot be read, or is not valid.
    """

    def __init__(self, model: ModelLike, target: Target) -> None:
        self.model, self._target = model, target
        loaded = frontend.load(model)
        self._ports = {value.name or "": value for value in loaded.graph.inputs}
        self._deciding = frozenset(deciding_inputs(loaded))
        self._sessions: OrderedDict[Hashable, Session] = OrderedDict()
        self.inputs = list(self._ports)

    def run(self, inputs: Sequence[Any] | Mapping[str, Any], **_: Any) -> tuple[Any, ...]:
        """The outputs, in the model's order.

        Args:
            inputs: by name, or in the order of `inputs`.

        Raises:
            InvalidArgument: an input is missing, unknown, or of a wrong dtype or shape.
            ModelError: the model does not fit these inputs, or cannot be compiled.
            RunError: a rank failed.
        """
        feeds = self.feeds(inputs)
        return tuple(self.session(feeds).run(None, feeds))

    def session(self, feeds: Mapping[str, Any]) -> Session:
        """The session for inputs like `feeds`."""
        options = self.options(feeds)
        key = (
            tuple(sorted(options.shapes.items())),
            tuple(sorted((name, x.dtype.str, x.tobytes()) for name, x in options.values.items())),
        )
        if key not in self._sessions:
            plan = compile_model(self.model, options).plan
            assert plan is not None
            self._keep(key, Session(plan, self._target.session))
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def options(self, feeds: Mapping[str, Any]) -> Options:
        """What is compiled for inputs like `feeds`."""
        values = {name: x for name, x in feeds.items() if name in self._deciding and isinstance(x, np.ndarray)}
        shapes = {name: x.shape for name, x in feeds.items() if isinstance(x, np.ndarray)}
        return Options(Mesh.of(tp=self._target.ranks), shapes, values=values, allow_replicated=True)

    @property
    def plan(self) -> Plan | None:
        """The plan of the last run; None before the first."""
        return next(reversed(self._sessions.values())).plan if self._sessions else None

    @property
    def on_host(self) -> list[str]:
        """The kernels that run on the host beside a GPU, of all open sessions."""
        engines = (engine for session in self._sessions.values() for engine in session.engines.values())
        return sorted({kernel for engine in engines for kernel in engine.on_host})

    def close(self) -> None:
        """End all sessions."""
        while self._sessions:
            self._sessions.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, key: Hashable, session: Session) -> None:
        self._sessions[key] = session
        if len(self._sessions) > KEPT:
            self._sessions.popitem(last=False)[1].close()

    def feeds(self, inputs: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
        """The inputs by name, as arrays of the host. Raises InvalidArgument where there are too many."""
        if not isinstance(inputs, Mapping):
            if len(inputs) > len(self.inputs):
                raise InvalidArgument(
                    f"{len(inputs)} inputs are given, but the model has {len(self.inputs)}: {', '.join(self.inputs)}",
                    code="OM5003",
                )
            inputs = dict(zip(self.inputs, inputs))
        return {name: _host(self._ports.get(name), x) for name, x in inputs.items()}


def _host(port: ir.Value | None, value: Any) -> Any:
    """A tensor as an array of the host; a sequence or an optional as it is."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if port is not None and isinstance(port.type, ir.TensorType) else value
