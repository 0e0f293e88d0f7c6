"""Merged linears: which products become one, that a rank's piece is right, and biases in front of what is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import inputs
import numpy as np
import onnx_ir as ir
import pytest
from lockstep import run
from net import Net

import onnxmesh
from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.passes.fuse.early_bias import early_bias
from onnxmesh.passes.fuse.fuse import fuse
from onnxmesh.passes.fuse.merge_linears import merge_linears
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Placement, R, Segment, Shard, cut
from onnxmesh.runtime.recipe import evaluate_shard

RANKS, ROWS, WIDTH = 2, 3, 4
MESH = Mesh.of(tp=RANKS)


class RankNet(Net):
    """A rank's graph for two ranks, with weights that are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: dict[str, np.ndarray] = {}

    def weight(self, *shape: int, placement: Placement = R) -> ir.Value:
        """An initialiser of the model of that global shape."""
        name = f"w{len(self.whole)}"
        self.whole[name] = np.random.default_rng(len(self.whole)).standard_normal(shape).astype(np.float32)
        pieces = [cut(self.whole[name], placement, RANKS, rank, np) for rank in range(RANKS)]
        value = ir.Value(name=name, shape=ir.Shape(pieces[0].shape), type=ir.TensorType(ir.DataType.FLOAT))
        value.meta.update({recipes.KEY: recipes.source(name), "global_shape": shape, "spec": (("tp", placement),)})
        self.graph.initializers.add(value)
        self.feeds[value] = pieces
        return value

    def linear(self, x: ir.Value, n: int, *, placement: Placement = R, bias: bool = False) -> ir.Value:
        """A product of x with a weight of global size [k, n], cut alike with its bias."""
        weight = self.weight(int(x.shape[-1]), n, placement=placement)  # type: ignore[index, arg-type]
        product = self.op("MatMul", x, weight, shape=(*x.shape[:-1], weight.shape[1]))  # type: ignore[index, arg-type]
        if not bias:
            return product
        cuts = placement.moved(0) if isinstance(placement, Shard) else R
        return self.op("Add", product, self.weight(n, placement=cuts))

    def changed(self, change: Callable[[ir.Model], Any], *outputs: ir.Value) -> ir.Graph:
        """The graph after a pass; every rank's numbers must be the same."""
        self.graph.outputs.extend(outputs)
        feeds = {value: pieces * (RANKS // len(pieces)) for value, pieces in self.feeds.items()}
        before = [run(self.graph, feeds, MESH)[value] for value in outputs]
        change(ir.Model(self.graph, ir_version=10))
        for value in self.graph.initializers.values():
            spec, recipe = value.meta.get("spec", ()), value.meta[recipes.KEY]
            at = (MESH.coordinate(rank) for rank in range(RANKS))
            feeds[value] = [evaluate_shard(recipe, self.whole.__getitem__, spec, MESH, where) for where in at]
            assert all(piece.shape == tuple(value.shape or ()) for piece in feeds[value])
        after = run(self.graph, feeds, MESH)
        for value, old in zip(self.graph.outputs, before, strict=True):
            np.testing.assert_allclose(after[value], old, rtol=1e-5, atol=1e-6)
        return self.graph


def ops(graph: ir.Graph) -> list[str]:
    return sorted(node.op_type for node in graph)


def columns(*sizes: int) -> Shard:
    return Shard(1, tuple(map(Segment, sizes)))


def total(net: Net, values: Sequence[ir.Value]) -> ir.Value:
    """Where values of one shape meet."""
    return net.op("Sum", *values)


@pytest.mark.parametrize("bias", [False, True])
def test_a_rank_has_its_columns_of_every_weight(bias: bool) -> None:
    net = RankNet()
    x = net.input(ROWS, WIDTH)
    q = net.linear(x, 8, placement=columns(8), bias=bias)
    k, v = (net.linear(x, 4, placement=columns(4), bias=bias) for _ in range(2))
    graph = net.changed(merge_linears, net.op("Concat", q, k, v, axis=1, shape=(ROWS, 8)))
    assert ops(graph) == ["Add"] * bias + ["Concat", "MatMul", "Split"]
    weight, *rest = graph.initializers.values()
    assert weight.name == ("w0+w2+w4" if bias else "w0+w1+w2")
    assert weight.meta["spec"] == (("tp", columns(8, 4, 4)),)
    assert weight.meta["global_shape"] == (WIDTH, 16) and len(rest) == bias


def test_an_activation_keeps_its_product_and_a_gate_does_not() -> None:
    net = RankNet()
    x = net.input(ROWS, WIDTH)
    gate, up = net.op("Swish", net.linear(x, 6)), net.linear(x, 6)
    other = net.op("Gelu", net.linear(x, 6, bias=True))
    graph = net.changed(lambda model: fuse(merge_linears(model)), total(net, [net.op("Mul", gate, up), other]))
    assert ops(graph) == ["Fused", "FusedMatMul", "MatMul", "Split"]


def test_a_residual_keeps_its_product() -> None:
    net = RankNet()
    x = net.input(ROWS, WIDTH)
    added = net.op("Add", net.linear(x, WIDTH), x)
    assert ops(net.changed(merge_linears, total(net, [added, net.linear(x, WIDTH)]))).count("MatMul") == 2


def test_what_never_meets_stays_apart() -> None:
    net = RankNet()
    x = net.input(ROWS, WIDTH)
    first, second = ((net.linear(x, WIDTH), net.linear(x, WIDTH)) for _ in range(2))
    graph = net.changed(merge_linears, total(net, first), net.op("Exp", total(net, second)))
    assert ops(graph).count("MatMul") == ops(graph).count("Split") == 2


@pytest.mark.parametrize("placement", [columns(12), Shard(1, (Segment(12),), once=True)], ids=["columns", "once"])
def test_weights_that_are_cut_differently_stay_apart(placement: Shard) -> None:
    net = RankNet()
    x = net.input(ROWS, WIDTH)
    products = [net.linear(x, 12, placement=placement), net.linear(x, 6)]
    assert ops(net.changed(merge_linears, total(net, products))).count("MatMul") == 2


def test_groups_may_share_their_biases() -> None:
    net = RankNet()
    row, groups = net.weight(WIDTH), []
    for _ in range(2):
        x = net.input(ROWS, WIDTH)
        groups.append(total(net, [net.op("Add", net.linear(x, WIDTH), row) for _ in range(2)]))
    assert ops(net.changed(merge_linears, *groups)).count("MatMul") == 2


def test_an_output_keeps_its_product() -> None:
    net = RankNet()
    x = net.input(ROWS, WIDTH)
    first, second = (net.linear(x, WIDTH) for _ in range(2))
    assert ops(net.changed(merge_linears, total(net, [first, second]), first)).count("MatMul") == 2


def test_a_product_with_a_bias_and_one_without_stay_apart() -> None:
    net = RankNet()
    x = net.input(ROWS, WIDTH)
    products = [net.linear(x, WIDTH, bias=True), net.linear(x, WIDTH)]
    assert ops(net.changed(merge_linears, total(net, products))).count("MatMul") == 2


def test_a_weight_that_is_read_twice_stays() -> None:
    net = RankNet()
    x = net.input(ROWS, WIDTH)
    products = [net.linear(x, WIDTH) for _ in range(2)]
    node = products[0].producer()
    assert node is not None
    meet = total(net, products)
    again = net.op("MatMul", net.op("Exp", x), node.inputs[1], shape=(ROWS, WIDTH))
    assert ops(net.changed(merge_linears, meet, net.op("Exp", again))).count("MatMul") == 3


def test_a_bias_is_added_before_the_columns_are_sent() -> None:
    net = RankNet()
    split = {"split_dim": 1, "split_segments": [6, 1], "concat_dim": 0, "concat_segments": [ROWS * RANKS, 1]}
    product = net.linear(net.input(ROWS, WIDTH), 6)
    sent = net.op("AllToAll", product, axis="tp", ranks=RANKS, shape=(ROWS * RANKS, 3), **split)
    added = net.op("Add", sent, net.weight(6, placement=Shard(0, (Segment(6),))))
    graph = net.changed(early_bias, net.op("Exp", added))
    assert [node.op_type for node in graph] == ["MatMul", "Add", "AllToAll", "Exp"]


@pytest.mark.parametrize(("name", "merged"), [("llama_bf16", "S(1; 64,32,32)"), ("flux_op23", "S(1; ")])
def test_a_plan_holds_every_weight_once(name: str, merged: str) -> None:
    fixture = inputs.load(name)
    alone = onnxmesh.compile(fixture.path, dims=fixture.bindings()).report
    plan = onnxmesh.compile(fixture.path, dims=fixture.bindings(), tp=2)
    found = [w for w in plan.report["weights"] if "+" in w["name"]]
    assert found and any(w["placement"]["tp"].startswith(merged) for w in found)
    assert sum(w["bytes"] for w in plan.report["weights"]) == pytest.approx(alone["model"]["weight_bytes"], rel=0.01)
