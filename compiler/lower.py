"""Lower: from a rank's graph to a plan's program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler import memory
from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.loose import BODIES, CAPTURED, is_loose, kernel_of, loose_type, onnx_op
from onnxmesh.compiler.ir.rule import Shape, itemsize
from onnxmesh.compiler.ir.view import dtype_of, plain_attrs, shape_of
from onnxmesh.compiler.layout import layout, place_of, renames
from onnxmesh.compiler.ops.collectives import COLLECTIVES, unpack
from onnxmesh.compiler.trace import stored
from onnxmesh.passes.graph.constants import recipe_of
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Replicate
from onnxmesh.runtime.plan import Buffer, Collective, Control, Instruction, Launch, Plan, Port, Program, Spec, Weight


@dataclass
class _Lowering:
    """Buffers, weights and instructions while they are made.

    Attributes:
        of: the buffer of a value.
        made: the instructions that write what a value holds.
        needs: for every instruction, those that write what it reads.
        writers, users: by buffer with memory of its own, who writes any of it, and who uses it at all.
    """

    buffers: list[Buffer] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    of: dict[ir.Value, int] = field(default_factory=dict)
    made: dict[ir.Value, frozenset[int]] = field(default_factory=dict)
    needs: list[frozenset[int]] = field(default_factory=list)
    writers: dict[int, list[int]] = field(default_factory=dict)
    users: dict[int, list[int]] = field(default_factory=dict)

    def add(self, value: ir.Value, kind: Any, source: int = -1, offset: int = 0, strides: Shape = ()) -> int:
        """A buffer for a value."""
        self.buffers.append(Buffer(*_type(value), kind, offset, source, strides))
        self.of[value] = len(self.buffers) - 1
        return self.of[value]

    def buffer(self, value: ir.Value) -> int:
        """The buffer of a value, made when it is first asked for."""
        if value not in self.of:
            if is_loose(value):
                return self.add(value, "loose")
            place = place_of(value)
            if place.base is value:
                return self.add(value, "arena")
            window = place.window
            strides = () if window.is_row_major else window.strides
            self.add(value, "view", self.buffer(place.base), window.offset * itemsize(dtype_of(value)), strides)
        return self.of[value]

    def root(self, buffer: int) -> int:
        """The buffer whose bytes a view is."""
        while self.buffers[buffer].kind == "view":
            buffer = self.buffers[buffer].source
        return buffer


def lower(
    graph: ir.Graph,
    mesh: Mesh,
    dims: Mapping[str, int],
    producer: str,
    values: Mapping[str, np.ndarray] | None = None,
) -> Plan:
    """The plan of a graph that all axes have been applied to, and that is laid out.

    `dims` are the sizes and `values` the inputs that it was bound to.
    """
    program, weights = _program(graph)
    constants = {name: recipes.constant(array) for name, array in (values or {}).items()}
    return Plan(mesh, weights, (replace(program, dims=dict(dims), values=constants),), producer)


def _program(graph: ir.Graph) -> tuple[Program, tuple[Weight, ...]]:
    """The program of a graph that is laid out, and its weights."""
    state = _Lowering()
    for i, value in enumerate(graph.inputs):
        state.add(value, "input", i)
    for value in graph.initializers.values():
        state.weights.append(_weight(value))
        state.add(value, "weight", len(state.weights) - 1)
    for node in graph:
        if renames(node):
            parts = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            made = frozenset[int]().union(*(state.made.get(value, ()) for value in parts if value is not None))
            state.made.update(dict.fromkeys(node.outputs, made))
        else:
            _lower_node(state, node)
    for value, made in state.made.items():
        if value in state.of and made:
            stored(value, state.of[value], max(made))
    inputs = tuple(_port(state, value) for value in graph.inputs)
    outputs = tuple(_port(state, value) for value in graph.outputs)
    places = memory.plan(_lifetimes(state, outputs))
    buffers = tuple(
        replace(b, offset=places.offsets[i]) if b.kind == "arena" else b for i, b in enumerate(state.buffers)
    )
    instructions = tuple(_dependencies(state, places))
    return Program({}, inputs, outputs, buffers, instructions, places.size), tuple(state.weights)


def _lower_node(state: _Lowering, node: ir.Node) -> None:
    ins = tuple(-1 if value is None else state.buffer(value) for value in node.inputs)
    outs = tuple(state.buffer(value) for value in node.outputs)
    at = len(state.instructions)
    for buffer in (*ins, *outs):
        if buffer >= 0:
            state.users.setdefault(state.root(buffer), []).append(at)
    for buffer in outs:
        state.writers.setdefault(state.root(buffer), []).append(at)
    state.needs.append(frozenset[int]().union(*(state.made.get(v, ()) for v in node.inputs if v is not None)))
    state.made.update(dict.fromkeys(node.outputs, frozenset({at})))
    state.instructions.append(_instruction(node, ins, outs))


def _instruction(node: ir.Node, ins: tuple[int, ...], outs: tuple[int, ...]) -> Instruction:
    attrs = {name: _json(name, value) for name, value in plain_attrs(node).items()}
    origin = str(node.meta.get("origin", node.name) or "")
    if BODIES in node.meta:
        bodies = {name: _body(graph) for name, graph in sorted(node.meta[BODIES].items())}
        return Control(node.op_type, ins, outs, attrs, origin, captured=node.meta[CAPTURED], programs=bodies)
    if onnx_op(node) != node.op_type:
        return Launch(kernel_of(node), ins, outs, attrs, origin)
    if node.op_type not in COLLECTIVES:
        attrs.pop("ranks", None)
        return Launch(node.op_type, ins, outs, attrs, origin)
    axis = str(attrs.pop("axis"))
    attrs.pop("ranks")
    reason, stream = str(node.meta.get("reason", "")), int(node.meta.get("stream", 0))
    return Collective(node.op_type, axis, ins, outs, attrs, origin, reason, stream)


def _body(graph: ir.Graph) -> Program:
    """The program of a graph that a control flow node holds; it has no weights of its own."""
    layout(ir.Model(graph, ir_version=10))
    return _program(graph)[0]


def _type(value: ir.Value) -> tuple[str, Shape]:
    """What a buffer or a port says of a value: dtype and shape, or the type of a loose one."""
    found = loose_type(value)
    return (dtype_of(value), shape_of(value)) if found is None else (found.text, found.shape)


def _json(name: str, value: Any) -> Any:
    if name.endswith("segments"):
        return [[s.size, s.copies] for s in unpack(value)]
    if name == "expr":
        return json.loads(value)
    if name == "each":
        return [{key: _json(key, item) for key, item in attrs.items()} for attrs in json.loads(value)]
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
    dtype, shape = _type(value)
    if not is_loose(value):
        shape = tuple(value.meta.get("global_shape", shape))
    return Port(name, dtype, shape, _spec(value), state.buffer(value))


def _lifetimes(state: _Lowering, outputs: Iterable[Port]) -> dict[int, memory.Lifetime]:
    """Of every arena buffer; graph outputs live to the end.

    What another stream reads stays until its result is waited for: else whoever took over its place would wait too.
    """
    forever = {state.root(port.buffer) for port in outputs}
    end = len(state.instructions)
    joined = _joins(state)
    result = {}
    for i, buffer in enumerate(state.buffers):
        if buffer.kind == "arena":
            users = tuple(dict.fromkeys(state.users[i]))
            last = end if i in forever else max(max(users), *(joined.get(user, 0) for user in users))
            size = prod(buffer.shape) * itemsize(buffer.dtype)
            result[i] = memory.Lifetime(size, tuple(state.writers[i]), last, users)
    return result


def _joins(state: _Lowering) -> dict[int, int]:
    """For every instruction beside the first stream, the last one before its results are read."""
    reader: dict[int, int] = {}
    for at, needs in enumerate(state.needs):
        for made in needs:
            reader.setdefault(made, at)
    return {at: reader.get(at, at + 1) - 1 for at, item in enumerate(state.instructions) if item.stream}


def _dependencies(state: _Lowering, places: memory.Layout) -> list[Instruction]:
    """Fill in what every instruction waits for: who writes its inputs, and who used its place before."""
    none = frozenset[int]()
    return [
        replace(item, after=tuple(sorted(needs | places.waits.get(at, none))))
        for at, (item, needs) in enumerate(zip(state.instructions, state.needs))
    ]
