"""Early bias: a bias that is added behind an AllToAll is added in front of it, where it ends the product for nothing.

`AllToAll(MatMul(x, w)) + b` with each rank's columns of b becomes `AllToAll(MatMul(x, w) + b)` with all of them: the
numbers that are added are the same.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.compiler.ops.collectives import unpack
from onnxmesh.passes.fuse.fuse import is_row
from onnxmesh.passes.graph.build import fresh
from onnxmesh.passes.graph.constants import recipe_of
from onnxmesh.passes.graph.match import given, integer, ints, is_constant, only_user, other, producer, shape_of
from onnxmesh.runtime.placement import Replicate, Shard
from onnxmesh.runtime.plan import Spec


def early_bias(model: ir.Model) -> ir.Model:
    """Move the biases of a rank's graph in front of the AllToAlls that they wait for, in place."""
    graph = model.graph
    for send in [node for node in graph if node.op_type == "AllToAll"]:
        add = only_user(send.outputs[0], "Add")
        product = producer(send.inputs[0], "MatMul")
        if add is None or product is None or only_user(product.outputs[0]) is not send:
            continue
        bias = other(add, send.outputs[0])
        if is_constant(bias) and is_row(bias, send.outputs[0]) and _is_cut_alike(bias, send):
            _move(graph, send, add, bias)
    graph.sort()
    return model


def _is_cut_alike(bias: ir.Value, send: ir.Node) -> bool:
    """Whether a rank has of the bias the columns that it receives, and all of it would fit what is sent."""
    last, columns = len(shape_of(bias)) - 1, shape_of(send.inputs[0])[-1]
    split = Shard(last, unpack(ints(send, "split_segments")))
    cuts = integer(send, "split_dim") == len(shape_of(send.outputs[0])) - 1
    whole = tuple(bias.meta.get("global_shape", ()))
    return cuts and _spec(bias) == ((_axis(send), split),) and whole == (*shape_of(bias)[:-1], columns)


def _move(graph: ir.Graph, send: ir.Node, add: ir.Node, bias: ir.Value) -> None:
    sent, result = given(send, 0), add.outputs[0]
    name = fresh(graph, str(bias.name))
    while name in graph.initializers:
        name = fresh(graph, name)
    whole = ir.Value(name=name, shape=ir.Shape(bias.meta["global_shape"]), type=bias.type)
    whole.meta[recipes.KEY] = recipe_of(bias)
    graph.initializers.add(whole)
    before = ir.Value(name=fresh(graph, str(sent.name)), shape=sent.shape, type=sent.type)
    made = ir.node("Add", [sent, whole], outputs=[before], name=add.name)
    made.meta.update(add.meta)
    graph.append(made)
    send.replace_input_with(0, before)
    received = send.outputs[0]
    made_name, result.name = result.name, None
    result.replace_all_uses_with(received, replace_graph_outputs=True)
    graph.remove(add, safe=True)
    received.name = made_name
    received.meta.update(result.meta)
    if not bias.uses():
        del graph.initializers[str(bias.name)]


def _axis(send: ir.Node) -> str:
    return send.attributes["axis"].as_string()


def _spec(value: ir.Value) -> Spec:
    return tuple((axis, p) for axis, p in value.meta.get("spec", ()) if not isinstance(p, Replicate))
