"""What graphs of models outside the fixtures taught: small graphs with what once went wrong in them."""

from __future__ import annotations

import numpy as np
import pytest
from recognition import Arrays, check, normal, parsed, reference

from onnxmesh.compiler.api import Compilation, compile_model
from onnxmesh.compiler.options import CpStrategy, Options
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.session import Session


def agreed(
    body: str,
    inputs: Arrays,
    constants: Arrays,
    *,
    opset: int = 18,
    cp_strategy: CpStrategy = "auto",
    **ranks: int,
) -> Compilation:
    """The compilation of a graph whose plan gives what ONNX Runtime gives."""
    proto = parsed(body, inputs, constants, opset=opset)
    compiled = compile_model(proto, Options(Mesh.of(**ranks), cp_strategy=cp_strategy))
    assert compiled.plan is not None
    with Session(compiled.plan, timeout=30) as session:
        (found,) = session.run(None, dict(inputs))
    wanted = reference(proto, inputs)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))
    return compiled


def axis(compiled: Compilation) -> dict[str, float]:
    """What the report says of the only axis."""
    assert compiled.plan is not None
    (found,) = compiled.plan.report["axes"]
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_fused_modulation_is_cut_in_all_its_pieces(ranks: int) -> None:
    body = """
        m = MatMul (c, w)
        shift, scale, gate = Split <axis = 2, num_outputs = 3> (m)
        scaled = Mul (x, scale)
        shifted = Add (scaled, shift)
        up = MatMul (shifted, w_up)
        act = Relu (up)
        down = MatMul (act, w_down)
        gated = Mul (gate, down)
        y = Add (x, gated)
    """
    constants = {"w": normal(16, 96), "w_up": normal(32, 64), "w_down": normal(64, 32)}
    compiled = agreed(body, {"x": normal(2, 8, 32), "c": normal(2, 1, 16)}, constants, tp=ranks)
    assert axis(compiled)["linear_weight_bytes_per_rank"] == pytest.approx(1 / ranks)


def test_rows_picked_by_gather_nd_are_those_of_a_table() -> None:
    """Experts' weights, one matrix a token: cut on their own dims, as every weight is."""
    body = """
        up_rows = GatherND (up, chosen)
        down_rows = GatherND (down, chosen)
        h = MatMul (up_rows, x)
        act = Relu (h)
        y = MatMul (down_rows, act)
    """
    constants = {"up": normal(4, 64, 32), "down": normal(4, 32, 64)}
    chosen = np.arange(6)[:, None] % 4
    compiled = agreed(body, {"x": normal(6, 32, 1), "chosen": chosen}, constants, tp=2)
    assert axis(compiled)["flops_per_rank"] == pytest.approx(0.5)
    assert axis(compiled)["weight_bytes_sharded"] == 1
    assert axis(compiled)["collectives"] == 1


@pytest.mark.parametrize("first", [0, 2, 5])
def test_an_overwritten_range_is_a_concat(first: int) -> None:
    body = """
        x_t = Transpose <perm = [1, 0, 2]> (x)
        written = ScatterND (x_t, rows, part)
        back = Transpose <perm = [1, 0, 2]> (written)
        y = Relu (back)
    """
    rows = np.arange(first, first + 3)[:, None]
    inputs = {"x": normal(2, 8, 4), "part": normal(3, 2, 4)}
    assert "ScatterND" not in check(body, inputs, {"rows": rows}).ops


def test_an_overwritten_box_is_a_concat_along_its_one_short_dim() -> None:
    body = "y = ScatterND (x, at, part)"
    at = np.stack(np.meshgrid(np.arange(2), np.arange(3, 7), np.arange(4), indexing="ij"), axis=-1)
    inputs = {"x": normal(2, 8, 4), "part": normal(2, 4, 4)}
    assert check(body, inputs, {"at": at}).ops["Concat"] == 1
    shuffled = np.ascontiguousarray(at[:, ::-1])
    assert check(body, inputs, {"at": shuffled}).ops["ScatterND"] == 1


SELF = "q = Mul (x, a) k = Mul (x, b) v = Mul (x, c)"

SINK = """
    k_t = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, k_t)
    masked = Add (scores, mask)
    sinks = Expand (sink, size)
    joined = Concat <axis = -1> (masked, sinks)
    top = ReduceMax <keepdims = 1> (joined, last)
    low = Sub (joined, top)
    all_weights = Softmax <axis = -1> (low)
    weights = Slice (all_weights, zero, keys, last)
    y = MatMul (weights, v)
"""


@pytest.mark.parametrize("strategy", ["allgather", "ulysses", "ring"])
def test_a_sink_beside_the_scores_leaves_an_attention(strategy: CpStrategy) -> None:
    mask = np.where(np.tri(16, dtype=bool), 0, -np.inf).astype(np.float32)
    constants = {
        "mask": mask[None, None], "sink": normal(1, 4, 1, 1), "size": np.array([2, 4, 16, 1]),
        "last": np.array([-1]), "zero": np.array([0]), "keys": np.array([16]),
    }  # fmt: skip
    constants |= {name: normal(8, seed=i) for i, name in enumerate("abc")}
    inputs, body = {"x": normal(2, 4, 16, 8)}, SELF + SINK
    compiled = agreed(body, inputs, constants, cp=2, cp_strategy=strategy)
    kinds = {c["kind"] for c in compiled.plan.report["collectives"]}  # type: ignore[union-attr]
    assert ("Shift" in kinds) == (strategy == "ring")
    found = check(body, inputs, constants)
    assert found.ops["AttentionBlock"] == 1 and "Softmax" not in found.ops


def test_a_score_whose_weight_meets_a_value_is_no_sink() -> None:
    body = SINK.replace("weights = Slice (all_weights, zero, keys, last)", "weights = Identity (all_weights)")
    constants = {
        "mask": normal(1, 1, 6, 6), "sink": normal(1, 2, 1, 1), "size": np.array([1, 2, 6, 1]), "last": np.array([-1])
    }  # fmt: skip
    inputs = {"q": normal(1, 2, 6, 8), "k": normal(1, 2, 6, 8, seed=1), "v": normal(1, 2, 7, 8)}
    found = check(body, inputs, constants)
    assert "AttentionBlock" not in found.ops and "without a key" in found.misses("Attention")[0]


def test_a_sequence_without_self_attention_is_that_of_the_queries() -> None:
    """Attention to a text behind a linear attention over the image: the image is the sequence."""
    body = """
        k_t = Transpose <perm = [0, 1, 3, 2]> (k)
        q = Relu (x)
        scores = MatMul (q, k_t)
        weights = Softmax <axis = -1> (scores)
        y = MatMul (weights, k)
    """
    compiled = agreed(body, {"x": normal(1, 4, 16, 8), "k": normal(1, 4, 6, 8)}, {}, cp=2)
    assert axis(compiled)["flops_per_rank"] == pytest.approx(0.5)


@pytest.mark.parametrize(("groups", "ranks"), [(2, 2), (4, 2), (4, 4)])
def test_a_grouped_convolution_is_shared_by_its_groups(groups: int, ranks: int) -> None:
    body = f"h = MatMul (x, w) c = Conv <group = {groups}, pads = [1, 1]> (h, k, b) y = Relu (c)"
    constants = {"w": normal(12, 12), "k": normal(24, 8 // groups, 3), "b": normal(24)}
    compiled = agreed(body, {"x": normal(2, 8, 12)}, constants, tp=ranks)
    assert axis(compiled)["flops_per_rank"] == pytest.approx(1 / ranks)


def test_a_batched_constant_follows_the_batch() -> None:
    """Position keys that stand once for every head of every row of the batch."""
    body = """
        q = Mul (x, a)
        flat = Reshape (q, merged)
        by_position = MatMul (flat, positions)
        bias = Reshape (by_position, apart)
        k_t = Transpose <perm = [0, 1, 3, 2]> (x)
        scores = MatMul (q, k_t)
        biased = Add (scores, bias)
        weights = Softmax <axis = -1> (biased)
        y = MatMul (weights, x)
    """
    constants = {
        "a": normal(8), "merged": np.array([8, 16, 8]), "positions": normal(8, 8, 16),
        "apart": np.array([2, 4, 16, 16]),
    }  # fmt: skip
    compiled = agreed(body, {"x": normal(2, 4, 16, 8)}, constants, dp=2)
    assert axis(compiled)["collectives"] == 1
    assert axis(compiled)["flops_per_rank"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "of_logits",
    [
        "i = ArgMax <axis = 1, keepdims = 0> (logits) y = Cast <to = 1> (i)",
        "weights = Softmax <axis = 1> (logits) y = MatMul (weights, v)",
        "logs = LogSoftmax <axis = 1> (logits) y = ReduceMax <axes = [1]> (logs)",
    ],
)
def test_logits_of_a_shared_vocabulary_are_never_gathered(of_logits: str) -> None:
    words = 1 << 14
    constants = {"w": normal(8, words), **({"v": normal(words, 8)} if "v)" in of_logits else {})}
    compiled = agreed(f"logits = MatMul (x, w) {of_logits}", {"x": normal(512, 8)}, constants, opset=17, tp=2)
    assert axis(compiled)["bytes_sent"] < 512 * words


def test_a_number_that_one_rank_holds_is_not_written_into_the_expression_of_all() -> None:
    """On a sum over ranks a bias is added by one of them: so is what it is multiplied with."""
    body = """
        t = Transpose <perm = [1, 0]> (x)
        u = Transpose <perm = [1, 0]> (w)
        z = Gemm <alpha = 0.5, beta = 2.0> (t, u, b)
        y = LeakyRelu (z)
    """
    agreed(body, {"x": normal(8, 5), "w": normal(7, 8), "b": normal(7)}, {}, dp=2)


@pytest.mark.parametrize(("rows", "strategy"), [(4, "auto"), (1, "auto"), (1, "allgather"), (1, "ring")])
def test_every_stage_has_a_sequence_of_its_own(rows: int, strategy: CpStrategy) -> None:
    """A pyramid: a long stage attends to few keys that do not follow its rows, a short one to itself."""
    body = """
        q = MatMul (x, w)
        k_t = Transpose <perm = [0, 1, 3, 2]> (k)
        scores = MatMul (q, k_t)
        weights = Softmax <axis = -1> (scores)
        long = MatMul (weights, k)
        pooled = ReduceMean <keepdims = 1> (long, two)
        z = Add (small, pooled)
        z_t = Transpose <perm = [0, 1, 3, 2]> (z)
        own_scores = MatMul (z, z_t)
        own_weights = Softmax <axis = -1> (own_scores)
        y = MatMul (own_weights, z)
    """
    inputs = {"x": normal(1, 4, 64, 8), "k": normal(1, 4, 6, 8), "small": normal(1, 4, rows, 8)}
    constants = {"w": normal(8, 8), "two": np.array([2])}
    compiled = agreed(body, inputs, constants, cp=2, cp_strategy=strategy)
    assert axis(compiled)["flops_per_rank"] < 0.6
