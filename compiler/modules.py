"""The module of the network that a node of the model belongs to, as `transformer_blocks.3.attn`.

Exporters say it in a node's metadata, or in its name; else the names of the weights that it reads do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""The key of PyTorch's exporter: the modules around a node from the outermost to the node itself, as a Python list."""

_MADE = re.compile(r"~\d+$")


def original(name: str) -> str:
    """The name of the model's node that the compiler put one with this name in the place of."""
    return _MADE.sub("", name)


def modules(graph: ir.Graph) -> dict[str, str]:
    """The modules of a model's nodes, by the nodes' names, as far as the model says them."""
    found = {}
    for node in graph:
        module = _scope(node.metadata_props.get(SCOPES, "")) or _path(node.name or "")
        if node.name and module:
            found[node.name] = module
    return found


def module_of(nodes: Iterable[str], weights: Iterable[Sequence[str]], known: Mapping[str, str]) -> str:
    """The module of an instruction; empty where nothing says it.

    Args:
        nodes: the nodes that it comes from.
        weights: the tensors of the model that each of its weights is made from, the largest weight first.
        known: what `modules` found.
    """
    said = [known.get(name, "") for name in nodes]
    said = [module for module in said if module]
    if said:
        return max(said, key=lambda module: (said.count(module), module))
    for names in weights:
        holders = [name.replace("/", ".").strip(".").rpartition(".")[0] for name in names]
        if holders and all(holders):
            return common(holders)
    return ""


def common(paths: Sequence[str]) -> str:
    """What several paths begin with."""
    parts = zip(*(path.split(".") for path in paths))
    return ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts))


def _scope(text: str) -> str:
    """`['', 'model', 'model.layers.0', 'mul_3']` -> `model.layers.0`."""
    try:
        scopes = ast.literal_eval(text) if text else ()
    except (ValueError, SyntaxError):
        return ""
    named = [scope for scope in scopes[:-1] if isinstance(scope, str) and scope] if isinstance(scopes, list) else []
    return named[-1] if named else ""


def _path(name: str) -> str:
    """`/model/layers.0/mlp/MatMul` -> `model.layers.0.mlp`."""
    return ".".join(part for part in name.split("/")[:-1] if part)
