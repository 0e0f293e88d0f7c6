"""Fuse: nodes that a backend runs as one become one (docs/fusion.md).

Fusion runs on a rank's graph, when every axis has been applied. It changes no number: a fused op computes and rounds
as its ops would alone. First the epilogues of linear layers, then what surrounds a norm, then the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxmesh.compiler.ir.view import shape_of
from onnxmesh.compiler.ops.collectives import COLLECTIVES, VIEWS
from onnxmesh.compiler.reason import Reason
from onnxmesh.passes.fuse.expression import fuse_group
from onnxmesh.passes.fuse.groups import Group, Groups
from onnxmesh.passes.graph.match import Finding, given, label, last_axis, only_user, other, producer, users
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE
from onnxmesh.runtime.kernels.fused import CORES, ROTARY

NORMS = CORES["FusedNorm"]
ACTIVATIONS = ("Relu", "Gelu", "Swish")
MATMUL, NORM, CHAIN, REDUCED = "Fused linear layer", "Fused norm", "Fused chain", "All-reduce + residual + norm"


def fuse(model: ir.Model) -> tuple[ir.Model, list[Finding]]:
    """Fuse the nodes of a rank's graph, in place; what was fused, and what nearly."""
    graph = model.graph
    groups = Groups(graph)
    findings = [*_linear_layers(groups), *_norms(groups), *_chains(groups)]
    for group in groups.all:
        if len(group.times) > 1:
            fuse_group(graph, group, _op_type(group))
    graph.sort()
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return model, findings


def _op_type(group: Group) -> str:
    if group.core is None:
        return "Fused"
    return "FusedMatMul" if group.core.op_type == "MatMul" else "FusedNorm"


def _found(pattern: str, group: Group) -> Finding:
    ops = [node.op_type for node in reversed(group.times)]
    return Finding(pattern, label(group.core or group.root), True, " ".join(ops))


# --- what the passes before this one ask --------------------------------------------------------------------


def beside_products(graph: ir.Graph) -> Groups:
    """The groups of a graph's products: what ends a product is not free any more."""
    groups = Groups(graph)
    for _ in _linear_layers(groups):
        pass
    return groups


def joins(groups: Groups, value: ir.Value) -> bool:
    """Whether an elementwise op on a value joins what makes it: an elementwise op or a norm that nothing else reads."""
    node = value.producer()
    able = groups.is_free(node) or (node is not None and node.op_type in NORMS and len(node.outputs) == 1)
    return able and len(value.uses()) == 1 and not value.is_graph_output()


# --- linear layers ------------------------------------------------------------------------------------------


def _linear_layers(groups: Groups) -> Iterator[Finding]:
    """Start the groups of products and what ends them."""
    for node in groups.nodes:
        if node.op_type == "MatMul" and _is_linear(node):
            path = _epilogue(groups, node)
            if len(path) > 1:
                yield _found(MATMUL, groups.start(path, node))
            elif reason := _missed_epilogue(node.outputs[0]):
                yield Finding(MATMUL, label(node), False, reason)


def _is_linear(node: ir.Node) -> bool:
    a, b = given(node, 0), given(node, 1)
    return a is not b and len(shape_of(a)) >= 2 and len(shape_of(b)) == 2


def _epilogue(groups: Groups, node: ir.Node) -> list[ir.Node]:
    """A product, its bias, and an activation or a residual: what a GEMM does at its end for nothing."""
    path = [node]
    add = _next(groups, path, "Add")
    if add is not None and is_row(other(add, node.outputs[0]), node.outputs[0]):
        path.append(add)
    activation = _next(groups, path, *ACTIVATIONS)
    if activation is not None:
        if not _is_gate(activation):
            path.append(activation)
        return path
    value, add = path[-1].outputs[0], _next(groups, path, "Add")
    if add is not None and other(add, value) is not value and shape_of(other(add, value)) == shape_of(value):
        path.append(add)
    return path


def _next(groups: Groups, path: list[ir.Node], *ops: str) -> ir.Node | None:
    """The only reader of what a path makes, if it is one of `ops`, free and keeps the shape."""
    value = path[-1].outputs[0]
    user = only_user(value, *ops)
    return user if user is not None and groups.is_free(user) and _keeps(user, value) else None


def _keeps(node: ir.Node, value: ir.Value) -> bool:
    return shape_of(node.outputs[0]) == shape_of(value)


def is_row(value: ir.Value, product: ir.Value) -> bool:
    """Whether the value is one number a column."""
    *rows, columns = shape_of(value) or (0,)
    return columns == shape_of(product)[-1] and all(size == 1 for size in rows)


def _is_gate(activation: ir.Node) -> bool:
    """A Swish that is multiplied by something: GEMM libraries have none, and the product takes it in."""
    user = only_user(activation.outputs[0])
    return activation.op_type == "Swish" and user is not None and user.op_type in ELEMENTWISE


def _missed_epilogue(value: ir.Value) -> str:
    """Why what follows a product does not join it; empty where nothing could."""
    followers = users(value, "Add", *ACTIVATIONS)
    if followers:
        return _shared(value, "product")
    between = only_user(value, *COLLECTIVES, *VIEWS, "Transpose", "Cast")
    if between is not None and users(between.outputs[0], "Add", *ACTIVATIONS):
        return Reason(f"{_article(between)} stands before what would be its epilogue", "OM3502")
    return ""


def _article(node: ir.Node) -> str:
    return f"{'an' if node.op_type[0] in 'AEIOU' else 'a'} {node.op_type}"


# --- norms --------------------------------------------------------------------------------------------------


def _norms(groups: Groups) -> Iterator[Finding]:
    for node in groups.nodes:
        if node.op_type in NORMS and len(node.outputs) == 1:
            yield from _norm(groups, node)


def _norm(groups: Groups, node: ir.Node) -> Iterator[Finding]:
    """What is done to a norm's result, and what was done to its input: a residual is added, and read again later."""
    path, value = _after_norm(groups, node), given(node, 0)
    group = groups.start(path, node)
    groups.grow(group)
    before = producer(value, *ELEMENTWISE)
    if groups.is_free(before) and not groups.share(group, value):
        yield Finding(NORM, label(node), False, Reason("what is added after it may depend on its input", "OM3503"))
    if len(group.times) > 1:
        yield _found(NORM, group)
    for read in group.reads():
        sent = producer(read, "AllReduce", "ReduceScatter")
        if sent is not None:
            reason = Reason(f"{_article(sent)} is an instruction of its own", "OM3504")
            yield Finding(REDUCED, label(node), False, reason)


def _after_norm(groups: Groups, node: ir.Node) -> list[ir.Node]:
    """A norm and the chain of its readers: elementwise ops, and a Rotary where a row of the norm is a row of it."""
    path = [node]
    while (user := _next(groups, path, *ELEMENTWISE, ROTARY)) is not None:
        if user.op_type == ROTARY and not _turns(path, user):
            break
        path.append(user)
    return path


def _turns(path: list[ir.Node], rotary: ir.Node) -> bool:
    """Whether a Rotary is the first of a path, turns what the path makes and nothing else, and row by row."""
    value = path[-1].outputs[0]
    alone = given(rotary, 0) is value and len(value.uses()) == 1
    return alone and last_axis(path[0], default=-1) and all(node.op_type != ROTARY for node in path)


# --- what is left -------------------------------------------------------------------------------------------


def _chains(groups: Groups) -> Iterator[Finding]:
    for node in reversed(groups.nodes):
        if groups.is_free(node):
            group = groups.start([node])
            groups.grow(group)
            if groups.dissolve(group):
                continue
            if len(group.times) > 1:
                yield _found(CHAIN, group)
            elif reason := _missed_chain(node.outputs[0]):
                yield Finding(CHAIN, label(node), False, reason)


def _missed_chain(value: ir.Value) -> str:
    """Why an elementwise node stands alone although others follow."""
    between = only_user(value, *VIEWS, "Transpose", "Expand", "Slice")
    if between is not None and users(between.outputs[0], *ELEMENTWISE):
        return Reason(f"{_article(between)} stands between it and the next", "OM3502")
    if users(value, *ELEMENTWISE):
        return _shared(value, "value")
    return ""


def _shared(value: ir.Value, what: str) -> str:
    if value.is_graph_output():
        return Reason(f"its {what} is an output", "OM3501")
    return Reason(f"others read its {what}", "OM3501") if len(value.consumers()) > 1 else ""
