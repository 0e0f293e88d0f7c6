"""Partition: from a graph and one axis's strategies to the graph that one rank runs.

Every value becomes its local piece; a collective stands wherever a consumer wants another placement than the producer
makes; constants are cut when they are stored, so they cost nothing here. The result is a graph in normal form again,
to which the next axis is applied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.convenience import convert_attributes

from onnxmesh.compiler.ir import rule
from onnxmesh.compiler.ir.rule import OpView, Strategy
from onnxmesh.compiler.ir.view import view_of
from onnxmesh.passes.partition.expand import EXPANSIONS
from onnxmesh.passes.partition.local import DOMAIN, INTERNAL, Local, describe
from onnxmesh.runtime.placement import Placement, R, Shard, local_shape


def partition(
    model: ir.Model, axis: str, ranks: int, strategies: Mapping[ir.Node, Strategy], *, shard_outputs: bool
) -> ir.Model:
    """The graph that a rank of `axis` runs when every node of `model` follows its strategy."""
    graph = model.graph
    local = Local(axis, ranks)
    inputs = [local.add_input(value) for value in graph.inputs]
    users: dict[ir.Value, list[Placement]] = defaultdict(list)
    for node in graph:
        for value, placement in zip(node.inputs, strategies[node].ins):
            if value is not None:
                users[value].append(placement)
    for node in graph:
        run_node(local, node, view_of(node, ranks), strategies[node])
        for value in node.outputs:
            local.gather_first(value, users[value])
    outputs = [_output(local, value, strategies, shard_outputs) for value in graph.outputs]
    result = ir.Graph(
        inputs,
        outputs,
        nodes=local.nodes,
        initializers=_named(local.initializers, {v.name for v in inputs}),
        opset_imports={**model.opset_imports, DOMAIN: 1},
        name=graph.name,
    )
    _name_values(result)
    for value in (value for node in local.nodes for value in node.outputs):
        if "global_name" not in value.meta:
            value.meta[INTERNAL] = True
    copy = ir.Model(result, ir_version=model.ir_version)
    copy.meta.update(model.meta)
    return copy


def run_node(local: Local, node: ir.Node, view: OpView, strategy: Strategy) -> None:
    """Append the local form of a node."""
    wanted = [
        None if value is None else local.at(value, placement, node)
        for value, placement in zip(node.inputs, strategy.ins)
    ]
    local.origin = node
    outs = [
        (dtype, local_shape(shape, placement, local.ranks))
        for dtype, shape, placement in zip(view.out_dtypes, view.outs, strategy.outs)
    ]
    if strategy.expand:
        results = EXPANSIONS[strategy.expand](local, view, strategy, wanted, outs)
    else:
        results = _copy(local, node, view, strategy, wanted, outs)
    for value, result, placement in zip(node.outputs, results, strategy.outs):
        local.made[value] = placement
        local.values[value, placement] = describe(result, value, local.axis, placement)
    local.origin = None


def _copy(
    local: Local,
    node: ir.Node,
    view: OpView,
    strategy: Strategy,
    inputs: Sequence[ir.Value | None],
    outs: Sequence[tuple[str, Sequence[int]]],
) -> Sequence[ir.Value]:
    found = rule.find(node.op_type)
    changed = found.localise(view, strategy) if found is not None and found.localise is not None else {}
    results = local.op(node.op_type, inputs, outs, domain=node.domain)
    copy = local.nodes[-1]
    for name, attr in node.attributes.items():
        if name not in changed:
            copy.attributes[name] = attr
    for attr in convert_attributes(changed):
        copy.attributes[attr.name] = attr
    copy.meta.update(node.meta)
    return results


def _output(local: Local, value: ir.Value, strategies: Mapping[ir.Node, Strategy], shard_outputs: bool) -> ir.Value:
    producer = value.producer()
    made = strategies[producer].outs[value.index() or 0] if producer is not None else R
    wanted = made if shard_outputs and isinstance(made, Shard) else R
    result = local.at(value, wanted, producer)
    result.meta["output_name"] = value.meta.get("output_name", value.name)
    return result


def _named(values: list[ir.Value], taken: set[str | None]) -> list[ir.Value]:
    """Unique names for initialisers."""
    used = set(taken)
    for value in values:
        name, n = value.name, 1
        while name in used:
            name, n = f"{value.name}.{n}", n + 1
        value.name = name
        used.add(name)
    return values


def _name_values(graph: ir.Graph) -> None:
    """Names that read well and are unique: the global value's own, numbered where it has several local forms."""
    used = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for value in node.outputs:
            base = str(value.meta.get("global_name") or node.op_type.lower())
            name, n = base, 1
            while name in used:
                name, n = f"{base}.{n}", n + 1
            value.name = name
            used.add(name)
