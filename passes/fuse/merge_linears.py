"""Merge linears: the products of one input that meet again become one product (docs/fusion.md).

The queries, keys and values of an attention, the gate and the value of an MLP: `MatMul(x, [a b c])`, of the weights
side by side, and a Split whose outputs are views. One launch does the work of three, and fills the device better: 576 x
3072 x 3072 makes 60 tiles of 128 x 256 for 132 multiprocessors, 576 x 3072 x 9216 makes 180.

This runs on a rank's graph, when all axes have been applied. The merged weight is a recipe over the sources, so nothing
is computed here; a rank's piece is that of its parts side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.passes.fuse.fuse import beside_products, is_row
from onnxmesh.passes.graph.build import fresh
from onnxmesh.passes.graph.constants import recipe_of
from onnxmesh.passes.graph.match import given, is_constant, other, shape_of
from onnxmesh.passes.graph.provenance import stands_for
from onnxmesh.passes.partition.local import DOMAIN
from onnxmesh.runtime.placement import Placement, Replicate, Shard
from onnxmesh.runtime.plan import Spec

Kind = tuple[object, ...]
"""What products must have in common."""


@dataclass(frozen=True)
class _Linear:
    """A product of a weight that nothing else reads, and the constant bias that is added to it."""

    product: ir.Node
    add: ir.Node | None

    @property
    def weight(self) -> ir.Value:
        return given(self.product, 1)

    @property
    def bias(self) -> ir.Value | None:
        return None if self.add is None else other(self.add, self.product.outputs[0])

    @property
    def result(self) -> ir.Value:
        return (self.add or self.product).outputs[0]

    @property
    def columns(self) -> int:
        return shape_of(self.weight)[1]

    @property
    def kind(self) -> Kind | None:
        """None where it cannot be merged."""
        kinds = [_kind(value) for value in (self.weight, self.bias) if value is not None]
        return None if None in kinds else (given(self.product, 0), self.result.dtype, *kinds)


def merge_linears(model: ir.Model) -> ir.Model:
    """Merge the products of a rank's graph, in place."""
    graph = model.graph
    for group in _groups(_linears(graph)):
        _merge(graph, group)
    graph.sort()
    return model


# --- what is merged -----------------------------------------------------------------------------------------


def _linears(graph: ir.Graph) -> list[_Linear]:
    """The products of weights in which nothing but a bias would be the epilogue."""
    groups = beside_products(graph)
    epilogues = {group.core: [node for node in group.times if node is not group.core] for group in groups.all}
    found = []
    for node in groups.nodes:
        if node.op_type != "MatMul" or not _is_weight(given(node, 1)):
            continue
        after = epilogues.get(node, [])
        linear = _Linear(node, after[0] if after else None)
        ends = len(after) < 2 and (linear.add is None or _is_bias(linear.add, node.outputs[0]))
        if ends and not linear.result.is_graph_output():
            found.append(linear)
    return found


def _is_weight(value: ir.Value) -> bool:
    return is_constant(value) and len(shape_of(value)) == 2 and len(value.uses()) == 1 and not value.is_graph_output()


def _is_bias(add: ir.Node, product: ir.Value) -> bool:
    return add.op_type == "Add" and is_constant(other(add, product)) and is_row(other(add, product), product)


def _groups(linears: Iterable[_Linear]) -> list[list[_Linear]]:
    """Those of one kind that meet."""
    by_kind: dict[Kind, list[_Linear]] = {}
    for linear in linears:
        kind = linear.kind
        if kind is not None:
            by_kind.setdefault(kind, []).append(linear)
    return [group for alike in by_kind.values() if len(alike) > 1 for group in _meeting(alike) if len(group) > 1]


def _meeting(linears: Sequence[_Linear]) -> list[list[_Linear]]:
    """Those whose results come together: others would only lie in memory until they are read."""
    groups: list[tuple[set[ir.Node], list[_Linear]]] = []
    for linear in linears:
        reached = _reached(linear.result)
        for nodes, group in groups:
            if not nodes.isdisjoint(reached):
                nodes |= reached
                group.append(linear)
                break
        else:
            groups.append((reached, [linear]))
    return [group for _, group in groups]


def _reached(value: ir.Value) -> set[ir.Node]:
    """The readers of a value, those of the only reader's result, and so on."""
    reached: set[ir.Node] = set()
    while True:
        readers = set(value.consumers())
        reached |= readers
        reader = next(iter(readers), None)
        if reader is None or len(readers) > 1 or len(reader.outputs) > 1:
            return reached
        value = reader.outputs[0]


def _kind(value: ir.Value) -> Kind | None:
    """All of a weight but its last dim, which has whatever size and segments; None where its pieces have no order."""
    cuts: list[object] = []
    for axis, placement in _spec(value):
        if not isinstance(placement, Shard) or placement.once:
            return None
        cuts.append((axis, "columns") if _cuts_last(placement, value) else (axis, placement))
    *rows, _ = shape_of(value)
    return (value.dtype, tuple(rows), tuple(cuts))


def _cuts_last(placement: Placement, value: ir.Value) -> bool:
    return isinstance(placement, Shard) and placement.dim == len(shape_of(value)) - 1


def _spec(value: ir.Value) -> Spec:
    return tuple((axis, p) for axis, p in value.meta.get("spec", ()) if not isinstance(p, Replicate))


# --- merging ------------------------------------------------------------------------------------------------


def _merge(graph: ir.Graph, group: Sequence[_Linear]) -> None:
    """One product for all, split where theirs end."""
    first = group[0]
    weight = _beside(graph, [linear.weight for linear in group])
    biases = [linear.bias for linear in group if linear.bias is not None]
    rows = shape_of(first.result)[:-1]
    shape = (*rows, sum(linear.columns for linear in group))
    product = _node(graph, group, "MatMul", [given(first.product, 0), weight], shape)
    if biases:
        product = _node(graph, group, "Add", [product, _beside(graph, biases)], shape)
    pieces = [ir.Value(name=old.name, shape=old.shape, type=old.type) for old in (linear.result for linear in group)]
    split = ir.node("Split", [product], {"axis": len(rows)}, domain=DOMAIN, outputs=pieces)
    _describe(graph, split, group)
    for linear, piece in zip(group, pieces):
        old = linear.result
        piece.meta.update(old.meta)
        old.replace_all_uses_with(piece, replace_graph_outputs=True)
        old.name = None
        _remove(graph, linear)


def _remove(graph: ir.Graph, linear: _Linear) -> None:
    constants = [value for value in (linear.weight, linear.bias) if value is not None]
    graph.remove([node for node in (linear.add, linear.product) if node is not None], safe=True)
    for value in constants:
        if not value.uses() and value.name is not None:
            del graph.initializers[value.name]


def _node(
    graph: ir.Graph, group: Sequence[_Linear], op_type: str, inputs: Sequence[ir.Value], shape: Sequence[int]
) -> ir.Value:
    like = group[0].result
    value = ir.Value(name=fresh(graph, like.name or op_type), shape=ir.Shape(shape), type=like.type)
    _describe(graph, ir.node(op_type, inputs, outputs=[value]), group)
    results = [linear.result for linear in group]
    cuts = {tuple((axis, _cuts_last(placement, result)) for axis, placement in _spec(result)) for result in results}
    if len(cuts) == 1 and all("global_shape" in result.meta for result in results):
        value.meta["global_name"] = "+".join(str(result.meta.get("global_name", result.name)) for result in results)
        value.meta["global_shape"], value.meta["spec"] = _together(results)
    return value


def _describe(graph: ir.Graph, node: ir.Node, group: Sequence[_Linear]) -> None:
    """Put a node into the graph, with the name of all that it stands for."""
    sources = [linear.product for linear in group]
    node.name = fresh(graph, sources[0].name or node.op_type)
    node.meta.update(sources[0].meta)
    node.meta["origin"] = "+".join(str(source.meta.get("origin", source.name)) for source in sources)
    stands_for(node, sources)
    graph.append(node)


def _beside(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    """The initialiser that holds these one beside the other along the last dim."""
    first, last = values[0], len(shape_of(values[0])) - 1
    shape = [*shape_of(first)[:-1], sum(shape_of(value)[-1] for value in values)]
    name = "+".join(str(value.name) for value in values)
    while name in graph.initializers:  # biases that several groups share
        name = fresh(graph, name)
    merged = ir.Value(name=name, shape=ir.Shape(shape), type=first.type)
    merged.meta[recipes.KEY] = recipes.concat([recipe_of(value) for value in values], last)
    merged.meta["global_shape"], merged.meta["spec"] = _together(values)
    graph.initializers.add(merged)
    return merged


def _together(values: Sequence[ir.Value]) -> tuple[tuple[int, ...], Spec]:
    """The global shape and the placement of values that lie one beside the other along the last dim.

    A rank holds the pieces of the first, then those of the second: the segments of one cut after those of the other.
    """
    first, last = values[0], len(shape_of(values[0])) - 1
    spec = []
    for position, (axis, placement) in enumerate(_spec(first)):
        if isinstance(placement, Shard) and placement.dim == last:
            cuts = (_spec(value)[position][1] for value in values)
            placement = Shard(last, tuple(s for cut in cuts if isinstance(cut, Shard) for s in cut.segments))
        spec.append((axis, placement))
    whole = [tuple(value.meta.get("global_shape", shape_of(value))) for value in values]
    return (*whole[0][:-1], sum(each[-1] for each in whole)), tuple(spec)
