"""Graphs that were sharded elsewhere: they hold collectives, and every value in them is a rank's own.

There is one file for all ranks, or one for each. Their ranks become coordinates on the mesh axis `tp`, and where some
collectives join only groups of them, on `cp` and `tp`. Every rank is given the same inputs. What differs from rank to
rank, weights of several files and outputs, is what this project has for that (docs/dialect.md): one tensor that holds
the ranks' pieces along dim 0, sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ir.loose import is_loose
from onnxmesh.compiler.ir.view import shape_of
from onnxmesh.compiler.ops.collectives import COLLECTIVES
from onnxmesh.compiler.reason import Reason
from onnxmesh.passes.graph.constants import recipe_of
from onnxmesh.passes.graph.infer import DOMAIN, label
from onnxmesh.passes.graph.match import Finding
from onnxmesh.passes.normalise.collectives import Groups, Said, said, settle
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Placement, Shard
from onnxmesh.runtime.plan import Spec

AXES = ("cp", "tp")
"""The axes that the ranks of the files are on, outermost first."""

_EVENING = ("AllReduce", "AllGather", "Broadcast")
"""Collectives whose result is the same on all ranks of the axis."""

_PIECE = 1 << 24
"""Bytes of two weights that are compared at once."""

Tensors = tuple[ir.TensorProtocol, ...]


@dataclass(frozen=True)
class Imported:
    """What is known of the ranks that the files are for.

    Attributes:
        mesh: of all ranks, those of an axis that is added included.
        own: initialisers that differ from rank to rank: each rank's, by name.
        inputs: names of the inputs of which every rank is given its own.
    """

    mesh: Mesh
    own: Mapping[str, Tensors] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()

    @property
    def axes(self) -> list[tuple[str, int]]:
        """Axes of more than one of the files' ranks, outermost first, and their sizes."""
        return [(axis, self.mesh.axis_size(axis)) for axis in AXES if self.mesh.axis_size(axis) > 1]

    @property
    def ranks(self) -> int:
        """How many ranks the files are for."""
        return prod(size for _, size in self.axes)


# --- one file for each rank ---------------------------------------------------------------------------------


def together(models: Sequence[ir.Model]) -> tuple[ir.Model, dict[str, Tensors]]:
    """One model of those of all ranks, and the initialisers that differ; in it these have no numbers.

    Raises:
        ModelError: the graphs differ in more than their weights; says where first.
    """
    for model in models:
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    first, *others = models
    for rank, other in enumerate(others, 1):
        _compare(first.graph, other.graph, rank)
    _join_groups(models)
    own: dict[str, Tensors] = {}
    for name, value in first.graph.initializers.items():
        tensors = tuple(_tensor(model.graph, name) for model in models)
        if any(not _equal(tensors[0], tensor) for tensor in tensors[1:]):
            own[name] = tensors
            value.shape, value.type = ir.Shape(tensors[0].shape.numpy()), ir.TensorType(tensors[0].dtype)
            value.const_value = None
    return first, own


def _tensor(graph: ir.Graph, name: str) -> ir.TensorProtocol:
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def _equal(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Whether two tensors hold the same bytes; they are compared in pieces, since weights are mapped and large."""
    if a is b:
        return True
    one, other = _bytes(a), _bytes(b)
    pieces = range(0, max(one.size, other.size), _PIECE)
    return all(np.array_equal(one[start : start + _PIECE], other[start : start + _PIECE]) for start in pieces)


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _compare(ours: ir.Graph, theirs: ir.Graph, rank: int) -> None:
    """Raise ModelError at the first difference."""
    for mine, other in zip(_described(ours), _described(theirs)):
        if mine != other:
            raise ModelError(
                f"the graphs of rank 0 and rank {rank} differ: {mine} in one, {other} in the other",
                hint="files of several ranks may differ in the numbers of their weights only",
                code="OM1401",
            )


def _described(graph: ir.Graph) -> Iterator[str]:
    """Everything that must be the same for all ranks, as texts."""
    for what, values in (("input", graph.inputs), ("output", graph.outputs)):
        yield f"{len(values)} {what}s"
        for value in values:
            yield f"the {what} '{value.name}' {value.type} {value.shape}"
    for name in sorted(graph.initializers):
        tensor = graph.initializers[name].const_value
        yield f"the weight '{name}'" + (f" {tensor.dtype}{list(tensor.shape)}" if tensor is not None else "")
    for node in graph:
        ends = [[value and value.name for value in side] for side in (node.inputs, node.outputs)]
        yield f"{label(node)} from {ends[0]} to {ends[1]}"
        for name in sorted(node.attributes):
            if not (node.op_type == "DistCollective" and name == "groups"):
                yield f"{label(node)} with {_attribute(node.attributes[name])}"
    yield "the end of the graph"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR):
        return f"its own {attribute.name} {ir.serde.serialize_attribute(attribute).SerializeToString().hex()}"
    return f"{attribute.name} {attribute.value}"


def _join_groups(models: Sequence[ir.Model]) -> None:
    """A file may name the group of its own rank only: together they name all."""
    for nodes in zip(*(model.graph for model in models)):
        if nodes[0].op_type == "DistCollective" and "groups" in nodes[0].attributes:
            groups = dict.fromkeys(group for node in nodes for group in _said(node).groups)
            nodes[0].attributes["group_size"] = ir.AttrInt64("group_size", len(next(iter(groups))))
            nodes[0].attributes["groups"] = ir.AttrInt64s("groups", [rank for group in groups for rank in group])


# --- which ranks --------------------------------------------------------------------------------------------


def settled(
    model: ir.Model, mesh: Mesh, own: Mapping[str, Tensors], files: int, inputs: Iterable[str] = ()
) -> Imported | None:
    """The mesh of a graph's own ranks, with its collectives settled on it; None where it has none.

    Args:
        mesh: what was asked for; `tp` and `cp` may be left to the graph.
        files: how many there are.
        inputs: those of which every rank is given its own.

    Raises:
        ModelError: there is no such input; the graph does not say how many ranks it is for; it, the files and the mesh
            contradict each other; or groups of ranks are on no mesh axis.
    """
    nodes = [(node, found) for node in model.graph.all_nodes() if (found := said(node)) is not None]
    known = {str(value.name) for value in model.graph.inputs}
    if unknown := sorted(set(inputs) - known):
        raise ModelError(
            f"the model has no input '{unknown[0]}'", hint=f"its inputs are {', '.join(sorted(known))}", code="OM1201"
        )
    if not nodes and files == 1:
        if set(inputs):
            raise ModelError("the model is for one rank: none of its inputs can be each rank's own", code="OM1406")
        return None
    for node, _ in nodes:
        if node.graph is not model.graph:
            raise ModelError(
                f"{label(node)} stands inside of a branch or loop", hint="collectives may not", code="OM1405"
            )
    ranks = _ranks([found for _, found in nodes], mesh, files)
    inner = _mesh(ranks, mesh, [found.groups for _, found in nodes])
    for node, found in nodes:
        axes = _axes(node, found, inner)
        settle(node, found, axes, [inner.axis_size(axis) for axis in axes])
    whole = Mesh.of(tp=inner.axis_size("tp"), cp=inner.axis_size("cp"), dp=mesh.axis_size("dp"))
    return Imported(whole, own, frozenset(inputs))


def _said(node: ir.Node) -> Said:
    found = said(node)
    assert found is not None
    return found


def _ranks(nodes: Sequence[Said], mesh: Mesh, files: int) -> int:
    """How many ranks the files are for."""
    asked = mesh.axis_size("cp") * mesh.axis_size("tp")
    said = {found.ranks for found in nodes if found.ranks and not found.groups} | ({files} - {1})
    named = max((rank + 1 for found in nodes for group in found.groups for rank in group), default=0)
    if len(said) > 1 or named > min(said, default=named):
        counts = ", ".join(map(str, sorted(said | {named} - {0})))
        raise ModelError(
            f"the model's files and collectives are for different numbers of ranks: {counts}", code="OM1402"
        )
    ranks = next(iter(said), named or asked)
    if asked not in (1, ranks):
        raise ModelError(
            f"the model is for {ranks} ranks already, but tp * cp is {asked}",
            hint="leave --tp and --cp out; --dp may be added",
            code="OM1402",
        )
    if ranks == 1:
        raise ModelError(
            "the model holds collectives, but does not say of how many ranks", hint="give --tp N", code="OM1402"
        )
    return ranks


def _mesh(ranks: int, asked: Mesh, groups: Sequence[Groups]) -> Mesh:
    """The ranks on `tp`; where there are groups of neighbours, these, and the groups on `cp`."""
    if asked.axis_size("cp") * asked.axis_size("tp") > 1:
        return Mesh.of(tp=asked.axis_size("tp"), cp=asked.axis_size("cp"))
    for group in (each[0] for each in groups if each):
        if len(group) < ranks and ranks % len(group) == 0:
            size = len(group) if group[1] - group[0] == 1 else ranks // len(group)
            return Mesh.of(tp=size, cp=ranks // size)
    return Mesh.of(tp=ranks)


def _axes(node: ir.Node, found: Said, mesh: Mesh) -> list[str]:
    """The axes along which the groups of a collective lie, outermost first."""
    inside = [axis for axis in AXES if mesh.axis_size(axis) > 1]
    if not found.groups:
        return inside
    for axes in (inside, *([axis] for axis in inside)):
        if set(mesh.groups(axes)) == set(found.groups):
            return axes
    raise ModelError(
        f"{label(node)}: the groups {[list(group) for group in found.groups]} are on no axis of the mesh {mesh}",
        hint="groups must be neighbours, or ranks one group apart, of equal sizes, and hold every rank",
        code="OM1403",
    )


# --- what differs from rank to rank -------------------------------------------------------------------------


def localise(model: ir.Model, imported: Imported) -> list[Finding]:
    """Give every rank its own of what differs, in place, when the axes that are added have been applied."""
    graph = model.graph
    inputs = [value for value in graph.inputs if value.name in imported.inputs]
    weights = [value for value in graph.initializers.values() if _reads(value) & imported.own.keys()]
    findings = [_output(graph, index, axes) for index, axes in _uneven_outputs(graph, (*inputs, *weights), imported)]
    for value in inputs:
        if not shape_of(value):
            raise ModelError(
                f"input '{value.name}' is a single number: the ranks' own have no dim to lie along", code="OM1406"
            )
        value.meta["global_shape"], value.meta["spec"] = _joined(value, imported.axes)
    for value in weights:
        _own_piece(graph, value, imported)
    return findings


def sources(imported: Imported) -> dict[str, ir.TensorProtocol]:
    """The ranks' own tensors, by the names that recipes have for them."""
    return {_source(name, rank): tensor for name, own in imported.own.items() for rank, tensor in enumerate(own)}


def _source(name: str, rank: int) -> str:
    return f"{name}@rank{rank}"


def _reads(value: ir.Value) -> set[str]:
    return set(recipes.sources(recipe_of(value)))


def _uneven_outputs(
    graph: ir.Graph, differing: Iterable[ir.Value], imported: Imported
) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """The outputs, by number, that may differ from rank to rank, and the axes on which they do."""
    sizes = dict(imported.axes)
    uneven = dict.fromkeys(differing, frozenset(sizes))
    for node in graph:
        axes = frozenset[str]().union(*(uneven.get(value, ()) for value in node.inputs if value is not None))
        axis = {node.attributes["axis"].as_string()} if node.op_type in COLLECTIVES else set()
        axes = axes - axis if node.op_type in _EVENING else axes | (axis & sizes.keys())
        uneven.update(dict.fromkeys(node.outputs, axes))
    for index, value in enumerate(graph.outputs):
        if uneven.get(value):
            yield index, [(axis, size) for axis, size in imported.axes if axis in uneven[value]]


def _joined(value: ir.Value, axes: Sequence[tuple[str, int]]) -> tuple[tuple[int, ...], Spec]:
    """The global shape of the ranks' pieces of a value along dim 0, and how it is cut."""
    shape = tuple(value.meta.get("global_shape", shape_of(value))) or (1,)
    ranks, local = prod(size for _, size in axes), (shape_of(value) or (1,))[0]
    cuts: list[tuple[str, Placement]] = []
    for axis, placement in value.meta.get("spec", ()):
        if isinstance(placement, Shard) and placement.dim == 0:
            placement = Shard(0, placement.segments * ranks, placement.once)
        cuts.append((axis, placement))
    left = ranks
    for axis, size in axes:
        cuts.append((axis, Shard.plain(0, local * left)))
        left //= size
    return (shape[0] * ranks, *shape[1:]), tuple(cuts)


def _own_piece(graph: ir.Graph, value: ir.Value, imported: Imported) -> None:
    """An initialiser whose recipe holds every rank's, one after another, in the place of one that is each rank's."""
    scalar, recipe = not shape_of(value), recipe_of(value)
    parts = [_renamed(recipe, imported.own.keys(), rank) for rank in range(imported.ranks)]
    piece = ir.Value(name=value.name, shape=ir.Shape(shape_of(value) or (1,)), type=value.type)
    piece.meta[recipes.KEY] = recipes.concat([recipes.reshape(p, (1,)) if scalar else p for p in parts], 0)
    piece.meta["global_shape"], piece.meta["spec"] = _joined(value, imported.axes)
    del graph.initializers[str(value.name)]
    graph.initializers.add(piece)
    if not scalar:
        value.replace_all_uses_with(piece, replace_graph_outputs=True)
        return
    number = ir.node("Reshape", [piece], domain=DOMAIN, name=f"{value.name}.number")
    number.outputs[0].shape, number.outputs[0].type = ir.Shape(()), value.type
    number.outputs[0].name = f"{value.name}.number"
    value.replace_all_uses_with(number.outputs[0], replace_graph_outputs=True)
    graph.insert_before(graph[0], number)


def _renamed(recipe: recipes.Recipe, names: object, rank: int) -> recipes.Recipe:
    """The recipe over one rank's own tensors."""
    if recipe["op"] == "source":
        own = recipe["name"] in names  # type: ignore[operator]
        return recipes.source(_source(recipe["name"], rank)) if own else recipe
    if "of" not in recipe:
        return recipe
    below = recipe["of"]
    of = [_renamed(r, names, rank) for r in below] if isinstance(below, list) else _renamed(below, names, rank)
    return {**recipe, "of": of}


def _output(graph: ir.Graph, index: int, axes: Sequence[tuple[str, int]]) -> Finding:
    """An output that differs is the ranks' own, one after another along dim 0."""
    value = graph.outputs[index]
    if is_loose(value):
        theirs = Reason("it may differ from rank to rank: it is rank 0's", "OM2304")
        return Finding("sharded elsewhere", str(value.name), False, theirs)
    name, ranks = str(value.meta.get("output_name", value.name)), prod(size for _, size in axes)
    copy = ir.node("Reshape", [value], domain=DOMAIN, name=f"{value.name}.ranks")
    made = copy.outputs[0]
    made.name, made.shape, made.type = copy.name, ir.Shape(shape_of(value) or (1,)), value.type
    made.meta.update(value.meta)
    made.meta["output_name"] = name
    made.meta["global_shape"], made.meta["spec"] = _joined(value, axes)
    graph.append(copy)
    graph.outputs[index] = made
    reason = f"it may differ from rank to rank: the output is the pieces of {ranks} ranks along dim 0"
    return Finding("sharded elsewhere", name, True, reason)
