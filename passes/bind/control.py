"""Control flow that folding does not remove: its graphs are bound for what they are given, and normalised.

A graph of an If, Loop, Scan or SequenceMap becomes a program of its own. What it captures of the graph around it, and
its constants, become inputs of the node, so that it stands by itself. It is not sharded: every rank runs it whole. What
changes its shape from one turn of a loop to the next is a loose value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.loose import BODIES, CAPTURED, loose_type
from onnxmesh.passes.bind.apart import make_token
from onnxmesh.passes.graph.build import fresh, is_folded
from onnxmesh.passes.graph.constants import SOURCES
from onnxmesh.passes.graph.fold import let_go
from onnxmesh.passes.graph.infer import DOMAIN, constant, label, present, static_shape
from onnxmesh.passes.graph.supported import check_supported
from onnxmesh.passes.normalise.normalise import normalise
from onnxmesh.runtime.control import CONTROL

_TAKEN = "taken"
"""`meta` key of a graph: the names of all initialisers of it, and of the graphs around it and within."""

Propagate = Callable[[ir.Graph], None]
Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Type:
    """An ONNX type, and the dims of a tensor: None where their number is not known."""

    type: ir.TypeProtocol
    dims: Dims | None = None


def is_control(node: ir.Node) -> bool:
    """Whether a node holds graphs."""
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def bind_control(graph: ir.Graph, node: ir.Node, propagate: Propagate) -> None:
    """Bind the graphs of a node, and give its outputs their types; `propagate` binds a graph.

    Raises:
        ModelError: as `propagate`; or the op is unknown, or what a loop carries changes its kind.
    """
    rule = _TYPES.get(node.op_type) if not node.domain else None
    if rule is None:
        raise ModelError(
            f"{label(node)} holds a graph, which is supported for {', '.join(CONTROL)} only", code="OM1307"
        )
    bodies = _Bodies(graph, node, propagate)
    for output, found in zip(node.outputs, rule(node, bodies)):
        declared = static_shape(output)
        output.type = found.type
        if isinstance(found.type, ir.TensorType):
            known = found.dims is not None and None not in found.dims
            dims: Sequence[int | None] | None = found.dims if known or declared is None else declared
            output.shape = None if dims is None else ir.Shape(dims)
    bodies.close()


# --- types --------------------------------------------------------------------------------------------------


def _type_of(value: ir.Value) -> Type:
    """The type of a value that is being bound, or that has become a token."""
    found = loose_type(value)
    if found is not None:
        unknown = not found.shape and isinstance(found.type, ir.TensorType) and found.type.dtype != ir.DataType.STRING
        return Type(found.type, None if unknown else tuple(None if d < 0 else d for d in found.shape))
    assert value.type is not None
    dims = None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape.dims)
    return Type(value.type, dims)


def _merged(node: ir.Node, one: Type, other: Type) -> Type:
    """What is known of a value that is of either type."""
    if one.type != other.type:
        if isinstance(one.type, ir.OptionalType) and one.type.elem_type == other.type:
            return one
        if isinstance(other.type, ir.OptionalType) and other.type.elem_type == one.type:
            return other
        raise ModelError(f"{label(node)} makes either {one.type} or {other.type} of one value", code="OM1308")
    if one.dims is None or other.dims is None or len(one.dims) != len(other.dims):
        return Type(one.type)
    return Type(one.type, tuple(a if a == b else None for a, b in zip(one.dims, other.dims)))


def _scalar(dtype: ir.DataType) -> Type:
    return Type(ir.TensorType(dtype), ())


def _with(dims: Dims | None, axis: int, size: int | None) -> Dims | None:
    """Dims with one more at `axis`."""
    if dims is None:
        return None
    axis %= len(dims) + 1
    return (*dims[:axis], size, *dims[axis:])


def _without(dims: Dims | None, axis: int) -> Dims | None:
    return None if dims is None else tuple(d for i, d in enumerate(dims) if i != axis % len(dims))


def _if(node: ir.Node, bodies: _Bodies) -> list[Type]:
    branches = [bodies.bind(name, []) for name in CONTROL["If"]]
    return [_merged(node, one, other) for one, other in zip(*branches)]


def _loop(node: ir.Node, bodies: _Bodies) -> list[Type]:
    carried = [_type_of(value) for value in node.inputs[2:] if value is not None]
    first = [_scalar(ir.DataType.INT64), _scalar(ir.DataType.BOOL)]
    results = _settle(node, bodies, first, carried, [], skip=1)
    rows = results[1 + len(carried) :]
    trips = _trips(node)
    return [*results[1 : 1 + len(carried)], *(Type(row.type, _with(row.dims, 0, trips)) for row in rows)]


def _trips(node: ir.Node) -> int | None:
    """How often a loop runs, where nothing ends it before."""
    trips, go = constant(node.inputs[0]), node.inputs[1]
    body = node.attributes["body"].as_graph()
    again = body.outputs[0]
    source = again.producer()
    while source is not None and source.op_type == "Identity" and source.inputs[0] is not None:
        again = present(source, 0)
        source = again.producer()
    starts = go is None or _is_true(go)
    if trips is None or not starts or not (again is body.inputs[1] or _is_true(again)):
        return None
    return max(0, int(trips.reshape(-1)[0]))


def _is_true(value: ir.Value) -> bool:
    """Whether a condition is a constant, and true."""
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return bool(node.attributes["value"].as_tensor().numpy().reshape(-1)[0])
    known = constant(value)
    return known is not None and bool(known.reshape(-1)[0])


def _scan(node: ir.Node, bodies: _Bodies) -> list[Type]:
    scanned = node.attributes.get_int("num_scan_inputs", 0)
    given = [_type_of(value) for value in node.inputs if value is not None]
    state, arrays = given[: len(given) - scanned], given[len(given) - scanned :]
    axes = node.attributes.get_ints("scan_input_axes", ()) or [0] * scanned
    slices = [Type(x.type, _without(x.dims, axis)) for x, axis in zip(arrays, axes)]
    sizes = {x.dims[axis] for x, axis in zip(arrays, axes) if x.dims is not None}
    size = sizes.pop() if len(sizes) == 1 else None
    results = _settle(node, bodies, [], state, slices)
    rows = results[len(state) :]
    out_axes = node.attributes.get_ints("scan_output_axes", ()) or [0] * len(rows)
    return [
        *results[: len(state)],
        *(Type(row.type, _with(row.dims, axis, size)) for row, axis in zip(rows, out_axes)),
    ]


def _settle(
    node: ir.Node,
    bodies: _Bodies,
    first: Sequence[Type],
    carried: list[Type],
    last: Sequence[Type],
    skip: int = 0,
) -> list[Type]:
    """Bind the body of a loop until what it carries has a type that it keeps; the types of the body's outputs."""
    while True:
        results = bodies.bind("body", [*first, *carried, *last])
        after = [_merged(node, one, other) for one, other in zip(carried, results[skip:])]
        if after == carried:
            return [*results[:skip], *after, *results[skip + len(carried) :]]
        carried = after


def _sequence_map(node: ir.Node, bodies: _Bodies) -> list[Type]:
    given = [_type_of(value) for value in node.inputs if value is not None]
    elements = [Type(x.type.elem_type) if isinstance(x.type, ir.SequenceType) else x for x in given]
    return [Type(ir.SequenceType(row.type)) for row in bodies.bind("body", elements)]


_TYPES: dict[str, Callable[[ir.Node, _Bodies], list[Type]]] = {}


# --- graphs -------------------------------------------------------------------------------------------------


class _Bodies:
    """The graphs of a node while they are bound. What they capture is the node's own in the end."""

    def __init__(self, graph: ir.Graph, node: ir.Node, propagate: Propagate) -> None:
        self.graph, self.node, self.propagate = graph, node, propagate
        self.bound: dict[str, ir.Graph] = {}
        self.captured: dict[str, dict[ir.Value, ir.Value]] = {}
        self.taken: set[str] = graph.meta.setdefault(_TAKEN, set(graph.initializers))
        self.names: dict[tuple[str, str], str] = {}

    def bind(self, name: str, types: Sequence[Type]) -> list[Type]:
        """Bind a copy of a graph for inputs of the given types; the types of its outputs."""
        body = self.node.attributes[name].as_graph().clone(allow_outer_scope_values=True)
        if len(body.inputs) != len(types):
            raise ModelError(
                f"{label(self.node)}: its {name} takes {len(body.inputs)} inputs, but gets {len(types)}", code="OM1308"
            )
        for value, found in zip(body.inputs, types):
            value.type = found.type
            value.shape = None if found.dims is None else ir.Shape(found.dims)
        body.opset_imports.update(self.graph.opset_imports)
        body.meta[_TAKEN] = self.taken
        for value in list(body.initializers.values()):
            _rename(body, value, self._own_name(name, value.name or "constant"))
        captured = _capture(body)
        self.propagate(body)
        normalise(ir.Model(body, ir_version=10))
        check_supported(body)
        self.bound[name], self.captured[name] = body, captured
        return [_type_of(value) for value in body.outputs]

    def _own_name(self, body: str, name: str) -> str:
        """The name of an initialiser of a body: its own, unless another graph's has it."""
        key = (body, name)
        if key not in self.names:
            self.names[key] = fresh(self.graph, name) if name in self.taken else name
            self.taken.add(self.names[key])
        return self.names[key]

    def close(self) -> None:
        """Make what all bodies read inputs of the node, after its operands, and of each of them."""
        for name, body in self.bound.items():
            for source, tensor in body.meta[SOURCES].items():
                if source not in self.graph.initializers:  # a recipe reads it
                    self.graph.register_initializer(_constant(source, tensor))
            for value in list(body.initializers.values()):
                own = _as_input(body, value)
                self.captured[name][self._hoisted(value, own)] = own
        node, everything = self.node, list(dict.fromkeys(v for some in self.captured.values() for v in some))
        for name, body in self.bound.items():
            captured = set(self.captured[name].values())
            formal = [value for value in body.inputs if value not in captured]
            rest = [self.captured[name].get(value) or _unread(body, value) for value in everything]
            body.inputs.clear()
            body.inputs.extend([*formal, *rest])
            let_go(node.attributes.pop(name).as_graph())
        count = len(node.inputs)
        node.resize_inputs(count + len(everything))
        for index, value in enumerate(everything):
            node.replace_input_with(count + index, value)
        node.meta[BODIES], node.meta[CAPTURED] = dict(self.bound), len(everything)
        node.domain = DOMAIN

    def _hoisted(self, value: ir.Value, own: ir.Value) -> ir.Value:
        """The constant of the graph around the body that one of the body's is."""
        name, graph = own.name or "constant", self.graph
        is_source = not is_folded(value) and recipes.get(value) is None
        if is_source and name in graph.initializers:
            return graph.initializers[name]
        result = ir.Value(name=name if is_source else fresh(graph, name), shape=value.shape, type=value.type)
        result.const_value = value.const_value
        result.meta.update(value.meta)
        graph.initializers.add(result)
        return result


def _capture(body: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Give the body a value of its own for each that it reads of the graph around it: an input, or a constant."""
    own = {*body.inputs, *body.initializers.values(), *(v for n in body.all_nodes() for v in n.outputs)}
    for inner in body.subgraphs():
        own |= {*inner.inputs, *inner.initializers.values()}
    copies: dict[ir.Value, ir.Value] = {}
    captured: dict[ir.Value, ir.Value] = {}

    def copy_of(value: ir.Value) -> ir.Value:
        if value not in copies:
            copies[value] = _copy(value)
            if value.is_initializer() and not value.is_graph_input():
                body.register_initializer(copies[value])
            else:
                captured[value] = copies[value]
                body.inputs.append(copies[value])
        return copies[value]

    for node in list(body.all_nodes()):
        for index, read in enumerate(node.inputs):
            if read is not None and read not in own:
                node.replace_input_with(index, copy_of(read))
    for index, output in enumerate(body.outputs):
        if output not in own:
            identity = ir.node("Identity", [copy_of(output)], name=fresh(body, "identity"))
            identity.outputs[0].name = fresh(body, output.name or "output")
            body.append(identity)
            body.outputs[index] = identity.outputs[0]
    return captured


def _rename(body: ir.Graph, value: ir.Value, name: str) -> None:
    """Another name for an initialiser, which no other graph's has; its tensor, the model's own, keeps its name."""
    del body.initializers[value.name or ""]
    named = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    named.meta.update(value.meta)
    value.replace_all_uses_with(named, replace_graph_outputs=True)
    body.register_initializer(named)


def _copy(value: ir.Value) -> ir.Value:
    """A value of the same name and type that nothing makes; a constant's holds the same tensor."""
    copy = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
    if value.is_initializer():
        copy.meta.update(value.meta)
    return copy


def _constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _as_input(body: ir.Graph, value: ir.Value) -> ir.Value:
    """An input in the place of a constant."""
    own = ir.Value(name=value.name, shape=value.shape, type=value.type)
    del body.initializers[value.name or ""]
    value.replace_all_uses_with(own, replace_graph_outputs=True)
    body.inputs.append(own)
    return own


def _unread(body: ir.Graph, value: ir.Value) -> ir.Value:
    """An input for what only another body of the node reads."""
    own = ir.Value(name=fresh(body, value.name or "captured"), shape=value.shape, type=value.type)
    make_token(own)
    return own


_TYPES.update({"If": _if, "Loop": _loop, "Scan": _scan, "SequenceMap": _sequence_map})
