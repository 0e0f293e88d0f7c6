"""The local graph while it is built: what partitioning and expansions build with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import convert_attributes

from onnxmesh.compiler import cost
from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.view import dtype_of, ir_dtype, is_constant, numpy_dtype, shape_of
from onnxmesh.passes.graph.constants import recipe_of
from onnxmesh.passes.graph.provenance import KEY as PROVENANCE
from onnxmesh.passes.graph.provenance import provenance
from onnxmesh.passes.partition.reshard import steps
from onnxmesh.runtime.placement import Placement, R, Replicate, Shard, local_shape
from onnxmesh.runtime.placement import text as placement_text

DOMAIN = "onnxmesh"
F32 = "float32"
Values = Sequence[ir.Value | None]
Types = Sequence[tuple[str, Sequence[int]]]
"""(dtype, local shape) of values."""


def given(values: Values, index: int) -> ir.Value | None:
    """The value at `index`, or None where it is absent."""
    return values[index] if index < len(values) else None


def required(values: Values, index: int) -> ir.Value:
    """The value at `index`, which is there."""
    value = given(values, index)
    assert value is not None
    return value


INTERNAL = "internal"
"""`meta` key of what an expansion makes on the way: it is a piece of no tensor of the model, on this axis and later."""


class Local:
    """One rank's graph on one axis."""

    def __init__(self, axis: str, ranks: int) -> None:
        self.axis, self.ranks = axis, ranks
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.memo: dict[Any, ir.Value] = {}
        self.values: dict[tuple[ir.Value, Placement], ir.Value] = {}
        self.made: dict[ir.Value, Placement] = {}
        self.origin: ir.Node | None = None

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outs: Sequence[tuple[str, Sequence[int]]],
        domain: str = DOMAIN,
        **attrs: Any,
    ) -> tuple[ir.Value, ...]:
        """Append a node; `outs` are (dtype, shape) of its outputs."""
        node = ir.Node(domain, op_type, list(inputs), convert_attributes(attrs), num_outputs=len(outs))
        for value, (dtype, shape) in zip(node.outputs, outs):
            value.dtype = ir_dtype(dtype)
            value.shape = ir.Shape(list(shape))
        if self.origin is not None:
            node.name = self.origin.name
            node.meta["origin"] = self.origin.meta.get("origin", self.origin.name)
            node.meta[PROVENANCE] = provenance(self.origin)
        self.nodes.append(node)
        return tuple(node.outputs)

    def one(
        self, op_type: str, inputs: Sequence[ir.Value | None], dtype: str, shape: Sequence[int], **attrs: Any
    ) -> ir.Value:
        """Append a node with one output."""
        return self.op(op_type, inputs, [(dtype, shape)], **attrs)[0]

    def collective(self, kind: str, value: ir.Value, shape: Sequence[int], *, reason: str, **attrs: Any) -> ir.Value:
        """Append a collective on this axis."""
        out = self.one(kind, [value], dtype_of(value), shape, axis=self.axis, ranks=self.ranks, **attrs)
        self.nodes[-1].meta["reason"] = reason
        return out

    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        """The value in another dtype."""
        if dtype_of(value) == dtype:
            return value
        return self.one("Cast", [value], dtype, shape_of(value), domain="", to=int(ir_dtype(dtype)))

    def scalar(self, number: float, dtype: str = F32) -> ir.Value:
        """A number as a constant."""
        return self.constant(np.array(number, numpy_dtype(dtype)))

    def constant(self, array: np.ndarray, placement: Placement = R) -> ir.Value:
        """A constant of the compiler's own: small, and cut like any other."""
        recipe = recipes.constant(array)
        key = (repr(recipe), placement)
        if key not in self.memo:
            shape = local_shape(array.shape, placement, self.ranks)
            value = ir.Value(name=f"{self.axis}_const_{len(self.memo)}", shape=ir.Shape(shape))
            value.dtype = ir_dtype(array.dtype.name)
            value.meta["recipe"], value.meta["global_shape"] = recipe, tuple(array.shape)
            value.meta["spec"] = ((self.axis, placement),)
            self.initializers.append(value)
            self.memo[key] = value
        return self.memo[key]

    def add_input(self, value: ir.Value) -> ir.Value:
        """A graph input: every rank gets the whole."""
        result = ir.Value(name=value.name, shape=value.shape, type=value.type)
        result.meta.update(value.meta)
        self.values[value, R] = result
        self.made[value] = R
        return result

    def at(self, value: ir.Value, placement: Placement, user: ir.Node | None) -> ir.Value:
        """The local value in a placement; made by a collective where it is not there yet."""
        key = (value, placement)
        if key in self.values:
            return self.values[key]
        if is_constant(value):
            self.values[key] = self._cut_constant(value, placement)
            return self.values[key]
        made = self.made[value]
        start = made
        if isinstance(placement, Shard) and (value, R) in self.values:
            start = R  # who holds it whole slices it for nothing
        self.origin = user
        current = self.values[value, start]
        reason = f"{value.name}: {placement_text(made, self.ranks)} -> {placement_text(placement, self.ranks)}"
        for kind, attrs, after in steps(start, placement):
            shape = local_shape(shape_of(value), after, self.ranks)
            current = self.collective(kind, current, shape, reason=reason, **attrs)
            current = describe(current, value, self.axis, after)
            self.values.setdefault((value, after), current)
        self.origin = None
        return current

    def gather_first(self, value: ir.Value, users: Sequence[Placement]) -> None:
        """Make the whole value first where that is cheaper than one collective for each of its users."""
        made = self.made[value]
        others = sorted({p for p in users if p != made}, key=str)
        if isinstance(made, Replicate) or len(others) < 2:
            return
        size = cost.nbytes(shape_of(value), dtype_of(value))
        each = sum(cost.reshard(size, made, p, self.ranks) for p in others)
        if R in others or cost.reshard(size, made, R, self.ranks) <= each:
            self.at(value, R, value.producer())

    def _cut_constant(self, value: ir.Value, placement: Placement) -> ir.Value:
        shape = local_shape(shape_of(value), placement, self.ranks)
        taken = sum(1 for other, _ in self.values if other is value)
        result = ir.Value(name=f"{value.name}.{taken}" if taken else value.name, shape=ir.Shape(shape), type=value.type)
        result.meta["recipe"] = recipe_of(value)
        result.meta["global_shape"] = value.meta.get("global_shape", shape_of(value))
        result.meta["spec"] = (*value.meta.get("spec", ()), (self.axis, placement))
        self.initializers.append(result)
        return result


def describe(result: ir.Value, value: ir.Value, axis: str, placement: Placement) -> ir.Value:
    """Note on a local value what it is a piece of."""
    if "global_shape" in result.meta and "global_name" in result.meta:
        return result
    result.meta["global_name"] = value.meta.get("global_name", value.name)
    result.meta["global_shape"] = value.meta.get("global_shape", shape_of(value))
    result.meta["spec"] = (*value.meta.get("spec", ()), (axis, placement))
    if INTERNAL in value.meta:
        result.meta[INTERNAL] = True
    return result
