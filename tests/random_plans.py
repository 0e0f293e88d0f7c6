"""Plans at random: any strategy for any node, on one axis after the other, run in lockstep.

A compiler that chooses well meets few of the combinations that its rules allow; here they all come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lockstep
import numpy as np
import onnx
import onnx_ir as ir

import onnxmesh.compiler.ops.table  # noqa: F401
from onnxmesh.compiler import frontend
from onnxmesh.compiler.ir.recipe import get as recipe_of
from onnxmesh.compiler.ir.rule import Strategy
from onnxmesh.compiler.ir.view import is_constant
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.normalise.normalise import SOURCES, normalise
from onnxmesh.passes.partition.partition import partition
from onnxmesh.passes.place.candidates import enumerate_strategies
from onnxmesh.passes.place.tie import tie
from onnxmesh.passes.recognise.recognise import recognise
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial
from onnxmesh.runtime.recipe import evaluate_shard

Chooser = Callable[[ir.Graph, str, int], Mapping[ir.Node, Strategy]]
"""(graph, axis, its size) -> the strategies of all nodes."""


def prepare(proto: onnx.ModelProto) -> ir.Model:
    """The model in normal form, recognised."""
    return recognise(normalise(bind(frontend.load(proto), {}, {})))[0]


def at_random(rng: np.random.Generator) -> Chooser:
    """Any strategy whose Partial inputs are made so; the replicated one is as likely as any other."""

    def choose(graph: ir.Graph, axis: str, ranks: int) -> Mapping[ir.Node, Strategy]:
        space = enumerate_strategies(tie(graph, ranks))
        chosen: dict[ir.Node, Strategy] = {}
        for node in graph:
            able = [s for s in space.strategies[space.quotient.class_of[node]] if _can_follow(node, s, chosen)]
            chosen[node] = able[rng.integers(len(able))]
        return chosen

    return choose


def _can_follow(node: ir.Node, strategy: Strategy, chosen: Mapping[ir.Node, Strategy]) -> bool:
    """Whether every Partial input is a constant, or comes out of its producer so."""
    for value, placement in zip(node.inputs, strategy.ins):
        if isinstance(placement, Partial) and value is not None and not is_constant(value):
            producer = value.producer()
            if producer is None or chosen[producer].outs[value.index() or 0] != placement:
                return False
    return True


def sharded(model: ir.Model, mesh: Mesh, choose: Chooser) -> ir.Model:
    """The graph that every rank runs."""
    for axis, ranks in mesh.axes:
        if ranks > 1:
            model = partition(model, axis, ranks, choose(model.graph, axis, ranks), shard_outputs=False)
    return model


def run(whole: ir.Model, local: ir.Model, inputs: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, lockstep.Pieces]:
    """The outputs of all ranks by name."""
    tensors = {name: v.const_value for name, v in whole.graph.initializers.items()} | whole.graph.meta[SOURCES]
    values = {value: [inputs[value.name or ""]] * mesh.size for value in local.graph.inputs}
    for value in local.graph.initializers.values():
        recipe, spec = recipe_of(value), value.meta.get("spec", ())
        assert recipe is not None
        values[value] = [
            evaluate_shard(recipe, lambda name: tensors[name].numpy(), spec, mesh, mesh.coordinate(rank))
            for rank in range(mesh.size)
        ]
    with np.errstate(all="ignore"):
        known = lockstep.run(local.graph, values, mesh)
    return {str(value.meta["output_name"]): known[value] for value in local.graph.outputs}
