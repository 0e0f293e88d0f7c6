"""The part of the report that says where things come from: instructions, the tensors between them, and decisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxmesh.compiler import predict
from onnxmesh.compiler.cost import nbytes
from onnxmesh.compiler.ir.rule import Strategy
from onnxmesh.compiler.layout import place_of
from onnxmesh.compiler.modules import module_of, original
from onnxmesh.passes.graph.provenance import provenance
from onnxmesh.passes.partition.local import INTERNAL
from onnxmesh.passes.place.decisions import Decision, Priced
from onnxmesh.passes.place.place import Placed
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import text
from onnxmesh.runtime.plan import Instruction, Plan, Spec, Weight
from onnxmesh.runtime.recipe import sources

Json = dict[str, Any]


def origins(plan: Plan, graph: ir.Graph, placed: Sequence[Placed], modules: Mapping[str, str]) -> Json:
    """The report's `instructions`, `tensors` and `decisions`; `graph` is what the plan was lowered from."""
    nodes = predict.executed(graph)
    used = sorted({number for node in nodes for numbers in provenance(node).values() for number in numbers})
    place_in = {number: place for place, number in enumerate(used)}
    everything = [(own, decision) for own in placed for decision in own.decisions]
    items = plan.programs[0].instructions
    return {
        "instructions": [_instruction(item, node, plan, modules, place_in) for item, node in zip(items, nodes)],
        "tensors": list(_tensors(plan, nodes)),
        "decisions": [_decision(*everything[number]) for number in used],
    }


def _instruction(
    item: Instruction, node: ir.Node, plan: Plan, modules: Mapping[str, str], place_in: Mapping[int, int]
) -> Json:
    known = provenance(node)
    names = list(dict.fromkeys(map(original, known)))
    buffers = [plan.programs[0].buffers[index] for index in item.ins if index >= 0]
    weights = [plan.weights[buffer.source] for buffer in buffers if buffer.kind == "weight"]
    decisions = {place_in[number] for numbers in known.values() for number in numbers}
    return {
        "nodes": names,
        "module": module_of(names, _sources(weights), modules),
        "decisions": sorted(decisions),
    }


def _sources(weights: Iterable[Weight]) -> Iterator[Sequence[str]]:
    for weight in sorted(weights, key=lambda weight: -nbytes(weight.shape, weight.dtype)):
        yield list(dict.fromkeys(sources(weight.recipe)))


def _tensors(plan: Plan, nodes: Sequence[ir.Node]) -> Iterator[Json]:
    """What instructions read and write, but for weights and inputs: by buffer, in the order of the program.

    What is a piece of another value is given that one's global view; what nobody knows the global view of is left out.
    """
    program, seen = plan.programs[0], set[int]()
    for item, node in zip(program.instructions, nodes):
        for index, value in zip((*item.ins, *item.outs), (*node.inputs, *node.outputs)):
            if value is None or index < 0 or index in seen or program.buffers[index].kind in ("weight", "input"):
                continue
            seen.add(index)
            known = value if "global_shape" in value.meta else place_of(value).base
            if "global_shape" in known.meta and INTERNAL not in known.meta:
                yield {"buffer": index, **_tensor(known, plan.mesh), "piece": known is not value}


def _tensor(value: ir.Value, mesh: Mesh) -> Json:
    """The global view of a local value."""
    return {
        "name": str(value.meta.get("global_name", value.name)).partition("~")[0],
        "shape": [int(size) for size in value.meta["global_shape"]],
        "placement": placement_by_axis(value.meta.get("spec", ()), mesh),
    }


def placement_by_axis(spec: Spec, mesh: Mesh) -> dict[str, str]:
    """Of every axis with more than one rank, as text."""
    given = dict(spec)
    return {axis: text(given[axis], size) if axis in given else "R" for axis, size in mesh.axes if size > 1}


def _decision(placed: Placed, decision: Decision) -> Json:
    return {
        "axis": placed.axis,
        "op": decision.view.op,
        "node": original(decision.node),
        "count": decision.count,
        "considered": decision.considered,
        "chosen": _priced(decision.chosen, placed.ranks),
        "alternatives": [
            {**_priced(other, placed.ranks), "allowed": other.allowed} for other in decision.alternatives
        ],
        "reason": decision.reason,
    }  # fmt: skip


def _priced(priced: Priced, ranks: int) -> Json:
    strategy: Strategy = priced.strategy
    ins, outs = [", ".join(text(placement, ranks) for placement in side) for side in (strategy.ins, strategy.outs)]
    return {
        "factor": strategy.factor,
        "expansion": strategy.expand,
        "placement": f"{ins} -> {outs}",
        "computing_us": round(priced.computing, 3),
        "moving_us": round(priced.moving, 3),
    }
