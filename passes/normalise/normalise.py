"""Bring a bound graph into the normal form of docs/dialect.md.

One walk in topological order. At each node, in this order: its rule rewrites it (and what the rule makes is walked
next), a node that does nothing disappears, a node of constants becomes a constant or a recipe.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.passes.graph.build import Builder, fresh, is_folded
from onnxmesh.passes.graph.constants import SOURCES, to_recipe
from onnxmesh.passes.graph.cse import share_common
from onnxmesh.passes.graph.fold import fold
from onnxmesh.passes.graph.infer import DOMAIN, NORMAL_OPSET
from onnxmesh.passes.normalise.attention import ATTENTION_RULES
from onnxmesh.passes.normalise.generate import GENERATE_RULES
from onnxmesh.passes.normalise.indexing import INDEXING_RULES
from onnxmesh.passes.normalise.linear_attention import LINEAR_ATTENTION_RULES
from onnxmesh.passes.normalise.losses import LOSS_RULES
from onnxmesh.passes.normalise.noops import drop_noop
from onnxmesh.passes.normalise.ops import RULES
from onnxmesh.passes.normalise.quantised import QUANTISED_RULES
from onnxmesh.passes.normalise.random import RANDOM_RULES
from onnxmesh.passes.normalise.spatial import SPATIAL_RULES

ALL_RULES = {
    **RULES,
    **INDEXING_RULES,
    **GENERATE_RULES,
    **RANDOM_RULES,
    **ATTENTION_RULES,
    **LOSS_RULES,
    **LINEAR_ATTENTION_RULES,
    **QUANTISED_RULES,
    **SPATIAL_RULES,
}


def normalise(model: ir.Model) -> ir.Model:
    """Rewrite a bound model into normal form, in place.

    Raises:
        ModelError: an input that must hold known numbers (axes, bounds) is computed from data, or an op is used
            in a way that has no normal form.
    """
    graph = model.graph
    tensors = {n: v.const_value for n, v in graph.initializers.items() if v.const_value is not None}
    for node in graph:
        if node.domain == "":
            if _made_here(node) and fold(graph, node):
                continue
            rule = ALL_RULES.get(node.op_type)
            if rule is not None and rule(node, Builder(graph, node)):
                continue
        if not drop_noop(graph, node):
            to_recipe(graph, node, tensors)
    share_common(graph)
    common.RemoveUnusedNodesPass()(model)
    _name_nodes(graph)
    graph.meta[SOURCES] = _sources(graph, tensors)
    model.opset_imports[DOMAIN] = 1
    model.opset_imports[""] = max(model.opset_imports.get("", 1), NORMAL_OPSET)
    return model


def _name_nodes(graph: ir.Graph) -> None:
    """Every node has a name of its own; messages and the report use it."""
    names: set[str | None] = {None, ""}
    for node in graph:
        if node.name in names:
            node.name = fresh(graph, node.name or node.outputs[0].name or node.op_type)
        names.add(node.name)


def _made_here(node: ir.Node) -> bool:
    """Whether all inputs are constants of the compiler: weights of the file are not copied, only recipes."""
    return all(v is None or is_folded(v) for v in node.inputs)


def _sources(graph: ir.Graph, tensors: dict[str, ir.TensorProtocol]) -> dict[str, ir.TensorProtocol]:
    found = (recipes.get(v) for v in graph.initializers.values())
    names = {name for recipe in found if recipe is not None for name in recipes.sources(recipe)}
    return {name: tensors[name] for name in sorted(names & tensors.keys())}
