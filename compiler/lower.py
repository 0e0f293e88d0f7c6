"""Lower: from a rank's graph to a plan's program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import onnx_ir as ir

from onnxmesh.compiler import memory
from onnxmesh.compiler.ir.rule import itemsize
from onnxmesh.compiler.ir.view import dtype_of, plain_attrs, shape_of
from onnxmesh.compiler.ops.collectives import COLLECTIVES, VIEWS, unpack
from onnxmesh.passes.normalise_constants import recipe_of
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Replicate
from onnxmesh.runtime.plan import Buffer, Collective, Instruction, Launch, Plan, Port, Program, Spec, Weight


@dataclass
class _Lowering:
    """Buffers, weights and instructions while they are made."""

    buffers: list[Buffer] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    of: dict[ir.Value, int] = field(default_factory=dict)
    writer: dict[int, int] = field(default_factory=dict)
    users: dict[int, list[int]] = field(default_factory=dict)

    def add(self, value: ir.Value, kind: Any, source: int = -1) -> int:
        """A buffer for a value."""
        self.buffers.append(Buffer(dtype_of(value), shape_of(value), kind, source=source))
        self.of[value] = len(self.buffers) - 1
        return self.of[value]

    def root(self, buffer: int) -> int:
        """The buffer whose bytes a view is."""
        while self.buffers[buffer].kind == "view":
            buffer = self.buffers[buffer].source
        return buffer


def lower(graph: ir.Graph, mesh: Mesh, dims: Mapping[str, int], producer: str) -> Plan:
    """The plan of a graph that all axes have been applied to."""
    state = _Lowering()
    for i, value in enumerate(graph.inputs):
        state.add(value, "input", i)
    for value in graph.initializers.values():
        state.weights.append(_weight(value))
        state.add(value, "weight", len(state.weights) - 1)
    for node in graph:
        _lower_node(state, node)
    layout = memory.plan(_lifetimes(state, graph))
    buffers = tuple(
        replace(b, offset=layout.offsets[i]) if b.kind == "arena" else b for i, b in enumerate(state.buffers)
    )
    program = Program(
        dims=dict(dims),
        inputs=tuple(_port(state, value) for value in graph.inputs),
        outputs=tuple(_port(state, value) for value in graph.outputs),
        buffers=buffers,
        instructions=tuple(_dependencies(state, layout)),
        arena_bytes=layout.size,
    )
    return Plan(mesh, tuple(state.weights), (program,), producer)


def _lower_node(state: _Lowering, node: ir.Node) -> None:
    if node.op_type in VIEWS:
        assert node.inputs[0] is not None
        state.add(node.outputs[0], "view", state.of[node.inputs[0]])
        return
    ins = tuple(-1 if value is None else state.of[value] for value in node.inputs)
    outs = tuple(state.add(value, "arena") for value in node.outputs)
    at = len(state.instructions)
    for buffer in ins:
        if buffer >= 0:
            state.users.setdefault(state.root(buffer), []).append(at)
    for buffer in outs:
        state.writer[buffer] = at
    state.instructions.append(_instruction(node, ins, outs))


def _instruction(node: ir.Node, ins: tuple[int, ...], outs: tuple[int, ...]) -> Instruction:
    attrs = {name: _json(name, value) for name, value in plain_attrs(node).items()}
    origin = str(node.meta.get("origin", node.name) or "")
    if node.op_type not in COLLECTIVES:
        attrs.pop("ranks", None)
        return Launch(node.op_type, ins, outs, attrs, origin)
    axis = str(attrs.pop("axis"))
    attrs.pop("ranks")
    reason, stream = str(node.meta.get("reason", "")), int(node.meta.get("stream", 0))
    return Collective(node.op_type, axis, ins, outs, attrs, origin, reason, stream)


def _json(name: str, value: Any) -> Any:
    if name.endswith("segments"):
        return [[s.size, s.copies] for s in unpack(value)]
    if name == "expr":
        return json.loads(value)
    if isinstance(value, (tuple, list)):
        return [_json("", item) for item in value]
    return value


def _weight(value: ir.Value) -> Weight:
    assert value.name is not None
    shape = tuple(value.meta.get("global_shape", shape_of(value)))
    return Weight(value.name, dtype_of(value), shape, _spec(value), recipe_of(value))


def _spec(value: ir.Value) -> Spec:
    return tuple((axis, p) for axis, p in value.meta.get("spec", ()) if not isinstance(p, Replicate))


def _port(state: _Lowering, value: ir.Value) -> Port:
    name = str(value.meta.get("output_name", value.name))
    shape = tuple(value.meta.get("global_shape", shape_of(value)))
    return Port(name, dtype_of(value), shape, _spec(value), state.of[value])


def _lifetimes(state: _Lowering, graph: ir.Graph) -> dict[int, memory.Lifetime]:
    """Of every arena buffer; graph outputs live to the end.

    What another stream reads stays until its result is waited for: else whoever took over its place would wait too.
    """
    forever = {state.root(state.of[value]) for value in graph.outputs}
    end = len(state.instructions)
    joined = _joins(state)
    result = {}
    for i, buffer in enumerate(state.buffers):
        if buffer.kind != "arena":
            continue
        first = state.writer[i]
        users = (first, *state.users.get(i, ()))
        last = end if i in forever else max(max(users), *(joined.get(user, 0) for user in users))
        result[i] = memory.Lifetime(prod(buffer.shape) * itemsize(buffer.dtype), first, last, users)
    return result


def _joins(state: _Lowering) -> dict[int, int]:
    """For every instruction beside the first stream, the last one before its results are read."""
    result = {}
    for at, item in enumerate(state.instructions):
        if item.stream:
            users = [user for buffer in item.outs for user in state.users.get(buffer, ()) if user > at]
            result[at] = min(users, default=at + 1) - 1
    return result


def _dependencies(state: _Lowering, layout: memory.Layout) -> list[Instruction]:
    """Fill in what every instruction waits for: who writes its inputs, and who used its place before."""
    result = []
    for at, item in enumerate(state.instructions):
        roots = (state.root(buffer) for buffer in item.ins if buffer >= 0)
        after = {state.writer[root] for root in roots if root in state.writer} | layout.waits.get(at, frozenset())
        result.append(replace(item, after=tuple(sorted(after - {at}))))
    return result
