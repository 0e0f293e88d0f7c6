"""A small graph in normal form, written node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from lockstep import run

from onnxmesh.compiler.ir.verify import verify
from onnxmesh.passes.graph.build import add_constant
from onnxmesh.runtime.mesh import Mesh

RNG = np.random.default_rng(5)


class Net:
    """The graph and its feeds; every input gets random numbers."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, "onnxmesh": 1})
        self.feeds: dict[ir.Value, list[np.ndarray]] = {}
        self.dtype = np.dtype(dtype)

    def input(self, *shape: int, dtype: Any = None) -> ir.Value:
        """A graph input."""
        array = RNG.standard_normal(shape).astype(dtype or self.dtype)
        value = ir.Value(name=f"x{len(self.feeds)}", shape=ir.Shape(shape))
        value.dtype = ir.DataType.from_numpy(array.dtype)
        self.graph.inputs.append(value)
        self.feeds[value] = [array]
        return value

    def number(self, value: float, *shape: int) -> ir.Value:
        """A folded constant."""
        array = np.full(shape, value, self.dtype)
        constant = add_constant(self.graph, array, f"c{len(self.graph.initializers)}")
        self.feeds[constant] = [array]
        return constant

    def op(
        self, op_type: str, *ins: ir.Value | None, shape: Sequence[int] = (), dtype: Any = None, **attrs: Any
    ) -> ir.Value:
        """A node; its output broadcasts the inputs unless `shape` is given."""
        node = ir.node(op_type, list(ins), attrs, name=f"{op_type.lower()}{len(self.graph)}")
        known = [tuple(value.shape.numpy()) for value in ins if value is not None and value.shape is not None]
        node.outputs[0].shape = ir.Shape(shape or np.broadcast_shapes(*known))
        node.outputs[0].dtype = ir.DataType.from_numpy(np.dtype(dtype or self.dtype))
        node.outputs[0].name = node.name
        self.graph.append(node)
        return node.outputs[0]

    def after(self, change: Callable[[ir.Model], Any], *outputs: ir.Value) -> ir.Graph:
        """The graph after a pass has changed it in place; the numbers must not have changed."""
        self.graph.outputs.extend(outputs)
        before = [run(self.graph, self.feeds, Mesh.of())[value][0] for value in outputs]
        change(ir.Model(self.graph, ir_version=10))
        verify(self.graph, "the pass")
        after = run(self.graph, self.feeds, Mesh.of())
        for value, old in zip(self.graph.outputs, before, strict=True):
            new = after[value][0] if value in after else None
            assert new is not None and new.dtype == old.dtype
            np.testing.assert_array_equal(new, old)
        return self.graph
