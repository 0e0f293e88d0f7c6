"""Graphs that were sharded elsewhere, by TensorRT's and ONNX Runtime's collectives, against the unsharded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from command import Command
from onnx import TensorProto, helper, numpy_helper

import onnxmesh
from onnxmesh.compiler.errors import ModelError
from onnxmesh.runtime.plan import Collective, Plan

RNG = np.random.default_rng(7)
HIDDEN, HEADS, WIDE, ROWS = 16, 4, 32, 8
Arrays = Mapping[str, np.ndarray]


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[0]))


WEIGHTS = {
    "scale": random(HIDDEN),
    "qkv": random(HIDDEN, 3 * HIDDEN),
    "out": random(HIDDEN, HIDDEN),
    "up": random(HIDDEN, WIDE),
    "up_bias": random(WIDE),
    "down": random(WIDE, HIDDEN),
    "down_bias": random(HIDDEN),
}
X = random(ROWS, HIDDEN)


class Graph:
    """A model while it is written."""

    def __init__(self, **weights: np.ndarray) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights = dict(weights)

    def __call__(self, op: str, *inputs: str | Sequence[int], **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        names = [i if isinstance(i, str) else self._numbers(f"{name}_{at}", i) for at, i in enumerate(inputs)]
        self.nodes.append(helper.make_node(op, names, [name], name, **attributes))
        return name

    def _numbers(self, name: str, numbers: Sequence[int]) -> str:
        self.weights[name] = np.array(numbers, np.int64)
        return name

    def model(self, *outputs: str, shape: Sequence[int] = X.shape, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
        ins = [helper.make_tensor_value_info("x", dtype, shape)]
        outs = [helper.make_tensor_value_info(name, dtype, None) for name in outputs]
        weights = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "sharded", ins, outs, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(plan: Plan, x: np.ndarray = X) -> list[np.ndarray]:
    with onnxmesh.Session(plan, timeout=20) as session:
        return session.run(None, {"x": x})


def kinds(plan: Plan) -> list[str]:
    return [f"{i.axis} {i.kind}" for i in plan.programs[0].instructions if isinstance(i, Collective)]


# --- a block of a transformer, whole and sharded ------------------------------------------------------------


def dist(g: Graph, operation: str, x: str, ranks: int, reduce: str = "none", root: int = -1, **more: Any) -> str:
    """TensorRT's node, with the attributes that its tools write."""
    attributes = {"collective_operation": operation, "reduce_op": reduce, "root": root, "nb_rank": ranks}
    return g("DistCollective", x, **attributes, **{"group_size": 0, **more})


def ort(g: Graph, op: str, x: str, **attributes: int) -> str:
    return g(op, x, domain="com.microsoft", **attributes)


class Whole:
    """What a sharded block sends; the whole one sends nothing."""

    def reduced(self, g: Graph, x: str) -> str:
        return x

    gathered = own = reduced


class TensorRT(Whole):
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def reduced(self, g: Graph, x: str) -> str:
        return dist(g, "all_reduce", x, self.ranks, "sum")

    def gathered(self, g: Graph, x: str) -> str:
        return dist(g, "all_gather", x, self.ranks)

    def own(self, g: Graph, x: str) -> str:
        """A rank's rows of what all ranks have: a reduce-scatter of the maximum."""
        return dist(g, "reduce_scatter", x, self.ranks, "max")


class OnnxRuntime(Whole):
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def reduced(self, g: Graph, x: str) -> str:
        return ort(g, "AllReduce", x)

    def gathered(self, g: Graph, x: str) -> str:
        return ort(g, "AllGather", x, group_size=self.ranks, axis=0)

    def own(self, g: Graph, x: str) -> str:
        """A rank's rows of what all ranks have, as every rank sends them."""
        sent = ort(g, "AllToAll", x, group_size=self.ranks)
        return g("Slice", sent, [0], [ROWS // self.ranks], [0])


def block(weights: Arrays, *, sends: Whole, by_rows: bool = False) -> onnx.ModelProto:
    """Attention and an MLP. Sharded by weights every rank has some heads and features; by rows, some rows of x."""
    g = Graph(**weights)
    heads = weights["out"].shape[0] * HEADS // HIDDEN
    x = sends.own(g, "x") if by_rows else "x"
    for sublayer in (attention, mlp):
        normed = g("LayerNormalization", x, "scale")
        x = g("Add", x, sublayer(g, normed, sends, by_rows, heads))
    if by_rows:
        sends.gathered(g, x)
    g.nodes[-1].output[0] = "y"
    return g.model("y")


def attention(g: Graph, x: str, sends: Whole, by_rows: bool, heads: int) -> str:
    width = HIDDEN // HEADS
    qkv = g("Transpose", g("Reshape", g("MatMul", x, "qkv"), [-1, 3, heads, width]), perm=[1, 2, 0, 3])
    q, k, v = (g("Gather", qkv, [n], axis=0) for n in range(3))
    if by_rows:
        k, v = (keys(g, value, sends) for value in (k, v))
    scores = g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = g("MatMul", g("Softmax", scores, axis=-1), v)
    rows = g("Reshape", g("Transpose", mixed, perm=[0, 2, 1, 3]), [-1, heads * width])
    product = g("MatMul", rows, "out")
    return product if by_rows else sends.reduced(g, product)


def keys(g: Graph, x: str, sends: Whole) -> str:
    """[1, h, s, d] with the rows of all ranks."""
    first = g("Transpose", x, perm=[2, 0, 1, 3])
    return g("Transpose", sends.gathered(g, first), perm=[1, 2, 0, 3])


def mlp(g: Graph, x: str, sends: Whole, by_rows: bool, heads: int) -> str:
    up = g("Relu", g("Add", g("MatMul", x, "up"), "up_bias"))
    product = g("MatMul", up, "down")
    return g("Add", product if by_rows else sends.reduced(g, product), "down_bias")


def share(rank: int, ranks: int) -> dict[str, np.ndarray]:
    """A rank's weights: heads and features."""
    qkv = WEIGHTS["qkv"].reshape(HIDDEN, 3, ranks, -1)[:, :, rank].reshape(HIDDEN, -1)
    cut = {name: np.split(WEIGHTS[name], ranks, 0)[rank] for name in ("out", "down")}
    cut |= {name: np.split(WEIGHTS[name], ranks, -1)[rank] for name in ("up", "up_bias")}
    return {**WEIGHTS, **cut, "qkv": qkv}


def expected() -> np.ndarray:
    model = block(WEIGHTS, sends=Whole()).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


@pytest.mark.parametrize("sends", [TensorRT, OnnxRuntime])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_file_for_each_rank_computes_what_the_whole_model_does(sends: Any, ranks: int) -> None:
    plan = onnxmesh.compile([block(share(rank, ranks), sends=sends(ranks)) for rank in range(ranks)])
    assert plan.mesh.axis_size("tp") == ranks
    assert kinds(plan) == ["tp AllReduce"] * 2
    np.testing.assert_allclose(run(plan)[0], expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sends", [TensorRT, OnnxRuntime])
@pytest.mark.parametrize("ranks", [2, 4])
def test_one_file_for_all_ranks_computes_what_the_whole_model_does(sends: Any, ranks: int) -> None:
    plan = onnxmesh.compile(block(WEIGHTS, sends=sends(ranks), by_rows=True))
    assert plan.mesh.axis_size("tp") == ranks
    assert sum("AllGather" in kind for kind in kinds(plan)) >= 2
    np.testing.assert_allclose(run(plan)[0], expected(), rtol=1e-4, atol=1e-5)


def test_a_rank_holds_its_own_weights() -> None:
    plan = onnxmesh.compile([block(share(rank, 2), sends=TensorRT(2)) for rank in range(2)])
    own = {weight.name: weight.shape for weight in plan.weights if weight.spec}
    assert own == {
        name: (2 * array.shape[0], *array.shape[1:])
        for name, array in share(0, 2).items()
        if name in ("qkv", "out", "up", "up_bias", "down")
    }


def test_it_computes_in_half_precision_if_asked() -> None:
    plan = onnxmesh.compile([block(share(rank, 2), sends=TensorRT(2)) for rank in range(2)], precision="bf16")
    assert {weight.dtype for weight in plan.weights if weight.spec} == {"bfloat16"}
    np.testing.assert_allclose(run(plan)[0], expected(), rtol=5e-2, atol=5e-2)


def test_the_batch_can_be_shared_out_besides() -> None:
    g = Graph(up=WEIGHTS["up"][:, :WIDE])
    y = dist(g, "all_reduce", g("MatMul", "x", "up"), 2, "avg")
    plan = onnxmesh.compile(g.model(y), dp=2)
    assert plan.mesh.to_json() == {"dp": 2, "cp": 1, "tp": 2}
    assert plan.report["axes"][0]["flops_sharded"] == 1.0
    np.testing.assert_allclose(run(plan)[0], X @ WEIGHTS["up"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shard_outputs", [False, True])
@pytest.mark.parametrize(
    ("sends", "by_rows", "dp"), [(TensorRT, False, 2), (TensorRT, True, 3), (OnnxRuntime, True, 2)]
)
def test_data_parallelism_goes_with_every_form(sends: Any, by_rows: bool, dp: int, shard_outputs: bool) -> None:
    files = [block(share(rank, 2), sends=sends(2)) for rank in range(2)]
    model = block(WEIGHTS, sends=sends(2), by_rows=True) if by_rows else files
    plan = onnxmesh.compile(model, dp=dp, shard_outputs=shard_outputs)
    assert plan.mesh.size == 2 * dp
    np.testing.assert_allclose(run(plan)[0], expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shard_outputs", [False, True])
def test_outputs_that_differ_from_rank_to_rank_may_be_cut_on_another_axis(shard_outputs: bool) -> None:
    models = []
    for rank in range(2):
        g = Graph(own=np.array(rank + 1, np.float32))
        models.append(g.model(g("Relu", dist(g, "all_to_all", g("Mul", "x", "own"), 2))))
    (want,), (got,) = run(onnxmesh.compile(models)), run(onnxmesh.compile(models, dp=2, shard_outputs=shard_outputs))
    np.testing.assert_array_equal(got, want)


def test_a_plan_of_several_files_is_saved_by_the_command_and_loaded(tmp_path: Path, command: Command) -> None:
    names = []
    for rank in range(2):
        names.append(str(tmp_path / f"rank{rank}.onnx"))
        onnx.save(block(share(rank, 2), sends=TensorRT(2)), names[-1])
    assert command("compile", *names, "-o", tmp_path / "sharded.plan").code == 0
    plan = onnxmesh.load(tmp_path / "sharded.plan")
    np.testing.assert_allclose(run(plan)[0], expected(), rtol=1e-4, atol=1e-5)
    onnx.save(block(WEIGHTS, sends=Whole()), tmp_path / "whole.onnx")
    assert command("verify", tmp_path / "whole.onnx", "--plan", tmp_path / "sharded.plan").code == 0
    g = Graph()
    onnx.save(g.model(g("Relu", "x")), tmp_path / "other.onnx")
    refused = command("verify", tmp_path / "other.onnx", "--plan", tmp_path / "sharded.plan")
    assert "the model has no output 'y'" in refused.err


# --- every collective ---------------------------------------------------------------------------------------

REDUCE = {
    "sum": lambda all_: np.sum(all_, 0),
    "prod": lambda all_: np.prod(all_, 0),
    "max": lambda all_: np.max(all_, 0),
    "min": lambda all_: np.min(all_, 0),
    "avg": lambda all_: np.mean(all_, 0, dtype=np.float32),
}


def sent(ranks: int, operation: str, reduce: str = "none", **attributes: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """What all ranks have after they send x times a number of their own: the plan's output, and what each sent."""
    factors = [np.float32(rank + 0.5) for rank in range(ranks)]
    models = []
    for factor in factors:
        g = Graph(own=np.array(factor))
        models.append(g.model(dist(g, operation, g("Mul", "x", "own"), ranks, reduce, **attributes)))
    return run(onnxmesh.compile(models))[0], [X * factor for factor in factors]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("reduce", REDUCE)
def test_reductions(ranks: int, reduce: str) -> None:
    got, pieces = sent(ranks, "all_reduce", reduce)
    want = REDUCE[reduce](pieces)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    got, _ = sent(ranks, "REDUCE_SCATTER", reduce.upper())
    np.testing.assert_allclose(got, want, rtol=1e-5)  # the ranks' parts of it, one after another
    got, _ = sent(ranks, "reduce", reduce, root=1)
    np.testing.assert_allclose(np.split(got, ranks)[1], want, rtol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_moves(ranks: int) -> None:
    root = ranks - 1
    got, pieces = sent(ranks, "all_gather")
    np.testing.assert_array_equal(got, np.concatenate(pieces))
    got, _ = sent(ranks, "gather", root=root)
    np.testing.assert_array_equal(np.split(got, ranks)[root], np.concatenate(pieces))
    got, _ = sent(ranks, "broadcast", root=root)
    np.testing.assert_array_equal(got, pieces[root])
    got, _ = sent(ranks, "scatter", root=root)
    np.testing.assert_array_equal(got, pieces[root])
    got, _ = sent(ranks, "all_to_all")
    blocks = [np.split(piece, ranks) for piece in pieces]
    np.testing.assert_array_equal(got, np.concatenate([blocks[a][b] for b in range(ranks) for a in range(ranks)]))


def test_along_another_dim() -> None:
    models = []
    for rank in range(2):
        g = Graph(own=np.array(rank + 1, np.float32))
        models.append(g.model(ort(g, "AllGather", g("Mul", "x", "own"), group_size=2, axis=-1)))
    np.testing.assert_array_equal(run(onnxmesh.compile(models))[0], np.concatenate([X, 2 * X], 1))


@pytest.mark.parametrize("dp", [1, 2])
def test_a_rank_may_be_given_its_own_inputs(dp: int) -> None:
    g = Graph()
    total, mine = dist(g, "all_reduce", "x", 2, "sum"), g("Relu", "x")
    plan = onnxmesh.compile(g.model(total, mine), own_inputs=["x"], dp=dp)
    fed = np.concatenate([X, -2 * X])
    got = run(plan, fed)
    np.testing.assert_allclose(got[0], -X, rtol=1e-6)
    np.testing.assert_array_equal(got[1], np.maximum(fed, 0))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_models_of_one_node_as_onnx_runtime_tests_its_collectives(axis: int | None) -> None:
    """They import `.com.microsoft`, with a dot, every rank has its own input, and the first had no axis."""
    fed = [X, -2 * X]
    for op, attributes, want in (
        ("AllReduce", {}, -X),
        ("AllGather", {"group_size": 2} | ({} if axis is None else {"axis": axis}), np.concatenate(fed, axis or 0)),
        ("AllToAll", {"group_size": 2}, np.concatenate([x[rows] for rows in (slice(4), slice(4, 8)) for x in fed])),
    ):
        g = Graph()
        model = g.model(ort(g, op, "x", **attributes))
        model.opset_import.append(helper.make_opsetid(".com.microsoft", 1))
        plan = onnxmesh.compile(model, tp=2, own_inputs=["x"])
        np.testing.assert_allclose(run(plan, np.concatenate(fed))[0], want, rtol=1e-6)


def test_only_inputs_of_several_ranks_can_be_their_own() -> None:
    g = Graph()
    model = g.model(dist(g, "all_reduce", "x", 2, "sum"))
    assert "no input 'past'" in refusal(model, own_inputs=["past"])
    g = Graph()
    assert "for one rank" in refusal(g.model(g("Relu", "x")), own_inputs=["x"])


# --- groups -------------------------------------------------------------------------------------------------

NEIGHBOURS, APART = [0, 1, 2, 3], [0, 2, 1, 3]


def in_groups(groups: list[int], operation: str, reduce: str = "none", **more: Any) -> tuple[np.ndarray, Plan]:
    models = []
    for rank in range(4):
        g = Graph(own=np.array(rank + 1, np.float32))
        mine = dist(g, operation, g("Mul", "x", "own"), 2, reduce, groups=groups, group_size=2, **more)
        models.append(g.model(mine))
    plan = onnxmesh.compile(models)
    return run(plan)[0], plan


@pytest.mark.parametrize(("groups", "axis", "sums"), [(NEIGHBOURS, "tp", (3, 7)), (APART, "cp", (4, 6))])
def test_groups_of_ranks_are_an_axis_of_the_mesh(groups: list[int], axis: str, sums: tuple[int, int]) -> None:
    got, plan = in_groups(groups, "all_reduce", "sum")
    assert plan.mesh.to_json() == {"dp": 1, "cp": 2, "tp": 2}
    assert kinds(plan) == [f"{axis} AllReduce"]
    np.testing.assert_allclose(got, np.concatenate([X * total for total in sums]), rtol=1e-6)


def test_a_file_may_name_the_group_of_its_rank_only() -> None:
    models = []
    for rank in range(4):
        g = Graph(own=np.array(rank + 1, np.float32))
        group = [0, 1] if rank < 2 else [2, 3]
        total = dist(g, "all_reduce", g("Mul", "x", "own"), 2, "sum", groups=group, group_size=2)
        models.append(g.model(dist(g, "all_gather", total, 4)))
    plan = onnxmesh.compile(models)
    assert kinds(plan) == ["tp AllReduce", "tp AllGather", "cp AllGather"]
    np.testing.assert_allclose(run(plan)[0], np.concatenate([3 * X, 3 * X, 7 * X, 7 * X]), rtol=1e-6)


@pytest.mark.parametrize("root", range(4))
@pytest.mark.parametrize("operation", ["broadcast", "reduce", "gather", "scatter", "reduce_scatter"])
def test_all_ranks_of_two_axes(operation: str, root: int) -> None:
    models = []
    for rank in range(4):
        g = Graph(own=np.array(rank + 1, np.float32))
        x = g("Mul", "x", "own")
        reduces = "reduce" in operation
        of_all = dist(g, operation, x, 4, "sum" if reduces else "none", root=-1 if "_" in operation else root)
        of_two = dist(g, "all_reduce", x, 2, "max", groups=NEIGHBOURS, group_size=2)
        models.append(g.model(of_all, of_two))
    got = run(onnxmesh.compile(models))[0]
    whole = np.concatenate([X * factor for factor in (1, 2, 3, 4)])
    own = whole[root * ROWS : (root + 1) * ROWS]
    want = {"broadcast": own, "scatter": own, "reduce_scatter": 10 * X, "reduce": 10 * X, "gather": whole}[operation]
    at_root = np.split(got, 4)[root] if operation in ("reduce", "gather") else got
    np.testing.assert_allclose(at_root, want, rtol=1e-6)


# --- what cannot be -----------------------------------------------------------------------------------------


def refusal(models: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as error:
        onnxmesh.compile(models, **options)
    return f"{error.value} {error.value.hint}"


def test_files_that_differ_in_more_than_weights_are_refused() -> None:
    one, other = (block(share(rank, 2), sends=TensorRT(2)) for rank in range(2))
    other.graph.node[3].attribute[0].ints[0] = 0
    assert "rank 0 and rank 1 differ" in refusal([one, other])
    uneven = [Graph(own=np.ones(size, np.float32)) for size in (16, 1)]
    assert "'own'" in refusal([g.model(g("Mul", "x", "own")) for g in uneven])


def test_counts_of_ranks_must_agree() -> None:
    model = block(WEIGHTS, sends=TensorRT(2), by_rows=True)
    assert "2 ranks already, but tp * cp is 4" in refusal(model, tp=4)
    assert "different numbers of ranks: 2, 3" in refusal([model] * 3)
    g = Graph()
    assert "--tp N" in refusal(g.model(ort(g, "AllReduce", "x")))


def test_an_all_reduce_that_says_no_count_takes_that_of_the_mesh() -> None:
    g = Graph()
    plan = onnxmesh.compile(g.model(ort(g, "AllReduce", "x")), tp=3)
    np.testing.assert_allclose(run(plan)[0], 3 * X, rtol=1e-6)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"operation": "all_shift"}, "all_shift"),
        ({"operation": "all_reduce"}, "with reduce_op none"),
        ({"operation": "all_gather", "reduce": "sum"}, "with reduce_op sum"),
        ({"operation": "broadcast"}, "no root"),
        ({"operation": "broadcast", "root": 2}, "the root is 2"),
        ({"operation": "all_reduce", "reduce": "sum", "groups": [0, 0]}, "no groups"),
        ({"operation": "all_reduce", "reduce": "sum", "groups": [1]}, "groups"),
    ],
)
def test_attributes_that_say_nothing_are_refused(attributes: dict[str, Any], said: str) -> None:
    g = Graph()
    assert said in refusal(g.model(dist(g, x="x", ranks=2, **attributes)))


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    g = Graph()
    assert "3 ranks cannot share dim 0" in refusal(g.model(dist(g, "scatter", "x", 3, root=0)))
    g = Graph()
    model = g.model(dist(g, "all_reduce", "x", 2, "avg"), dtype=TensorProto.INT64)
    assert "avg of int64 is not defined" in refusal(model)
    g = Graph()
    model = g.model(dist(g, "all_reduce", "x", 2, "sum", groups=[0, 3, 1, 2], group_size=2))
    assert "on no axis of the mesh" in refusal(model)
