"""Two axes, one after the other: graphs partitioned over cp, then over tp, agree with the graph as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import random_plans
from evaluate import evaluate

from onnxmesh.compiler.ir.rule import Strategy
from onnxmesh.compiler.options import CpStrategy
from onnxmesh.models.builder import GraphBuilder
from onnxmesh.models.flux import flux
from onnxmesh.models.gpt2 import gpt2
from onnxmesh.models.layers import Heads, attention, linear, linear_bias, merge_heads, rms_norm, silu, split_heads
from onnxmesh.models.llama import llama
from onnxmesh.models.wan import wan
from onnxmesh.passes.place.place import place
from onnxmesh.runtime.mesh import Mesh

BATCH, TOKENS, WIDTH = 2, 12, 16


def mlp() -> onnx.ModelProto:
    g = GraphBuilder("mlp")
    x = g.input("x", "float32", BATCH, TOKENS, WIDTH)
    y = rms_norm(g, x, "norm", WIDTH, 1e-6)
    up = linear_bias(g, y, "up", WIDTH, 24)
    y = g.op("Mul", silu(g, linear(g, y, "gate", WIDTH, 24)), up)
    g.op("Add", x, linear_bias(g, y, "down", 24, WIDTH), out="y")
    g.output("y", BATCH, TOKENS, WIDTH)
    return g.proto


def self_attention() -> onnx.ModelProto:
    g = GraphBuilder("attention")
    x = g.input("x", "float32", BATCH, TOKENS, WIDTH)
    sizes = Heads(BATCH, 4, TOKENS, TOKENS, 4)
    parts = g.split(linear(g, x, "qkv", WIDTH, 3 * WIDTH), 2, 3)
    q, k, v = (split_heads(g, part, BATCH, TOKENS, 4) for part in parts)
    mixed = merge_heads(g, attention(g, q, k, v, sizes, causal=True), BATCH, TOKENS)
    g.op("Add", x, linear(g, mixed, "o", WIDTH, WIDTH), out="y")
    g.output("y", BATCH, TOKENS, WIDTH)
    return g.proto


GRAPHS = {
    "mlp": mlp,
    "attention": self_attention,
    "llama": lambda: llama(
        layers=1, hidden=16, heads=4, kv_heads=2, intermediate=24, vocab=32, batch=2, seq=12, attention_mask=False
    ),
    "gpt2": lambda: gpt2(layers=1, hidden=16, heads=4, vocab=20, positions=16, batch=2, seq=12),
    "flux": lambda: flux(
        double=1, single=1, heads=4, head_dim=8, text=5, image=8, channels=4, text_width=8, pooled_width=8,
        axes=(2, 2, 4),
    ),
    "wan": lambda: wan(
        layers=1, heads=4, head_dim=12, intermediate=32, frames=2, height=4, width=8, text=6, text_width=8, channels=4
    ),
}  # fmt: skip


@cache
def prepared(name: str) -> ir.Model:
    return random_plans.prepare(GRAPHS[name]())


def inputs_of(model: ir.Model) -> Mapping[str, np.ndarray]:
    """Random numbers, token ids and positions that count, masks with padding on the left: rows that see nothing."""
    rng = np.random.default_rng(3)
    result = {}
    for value in model.graph.inputs:
        shape, dtype = tuple(value.shape), value.dtype.numpy()
        if dtype.kind == "f":
            result[value.name] = rng.standard_normal(shape).astype(dtype)
        elif "mask" in value.name:
            result[value.name] = (np.arange(shape[-1]) >= 2 * np.arange(shape[0])[:, None]).astype(dtype)
        else:
            result[value.name] = np.broadcast_to(np.arange(shape[-1], dtype=dtype) % 12, shape).copy()
    return result


def check(name: str, mesh: Mesh, choose: random_plans.Chooser) -> Counter[str]:
    """Compare on all ranks; the ops of the local graph, with their axis where they are collectives."""
    model = prepared(name)
    inputs = inputs_of(model)
    want = evaluate(model, inputs)
    local = random_plans.sharded(model, mesh, choose)
    got = random_plans.run(model, local, inputs, mesh)
    for output, whole in want.items():
        for rank, piece in enumerate(got[output]):
            np.testing.assert_allclose(piece, whole, 1e-3, 1e-4, err_msg=f"{output} on rank {rank}")
    return Counter(
        node.op_type + (f":{node.attributes['axis'].value}" if "ranks" in node.attributes else "")
        for node in local.graph
    )


def by_cost(cp_strategy: CpStrategy) -> random_plans.Chooser:
    """What the compiler chooses."""

    def choose(graph: ir.Graph, axis: str, ranks: int) -> Mapping[ir.Node, Strategy]:
        return place(graph, axis, ranks, cp_strategy=cp_strategy, shard_outputs=False).strategies

    return choose


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("cp_strategy", ["allgather", "ulysses", "ring"])
def test_context_then_tensor_parallel(name: str, cp_strategy: CpStrategy) -> None:
    ops = check(name, Mesh.of(cp=2, tp=2), by_cost(cp_strategy))
    assert any(op.endswith(":tp") for op in ops)
    if name != "mlp":
        assert any(op.endswith(":cp") for op in ops)


def test_heads_of_ulysses_are_cut_again_by_tp() -> None:
    ops = check("attention", Mesh.of(cp=2, tp=2), by_cost("ulysses"))
    assert ops["AllToAll:cp"] == 2
    assert not ops["AllToAll:tp"]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("seed", range(6))
def test_random_plans(name: str, seed: int) -> None:
    mesh = (Mesh.of(tp=2), Mesh.of(cp=2, tp=2), Mesh.of(tp=4), Mesh.of(cp=2, tp=3), Mesh.of(dp=2, tp=2), Mesh.of(cp=4))[
        seed
    ]
    check(name, mesh, random_plans.at_random(np.random.default_rng(seed)))
