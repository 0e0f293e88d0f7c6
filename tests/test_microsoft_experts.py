"""MoE of com.microsoft: the router's choice, the experts' layers, and how a mesh shares the experts out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import shares
from microsoft_cases import Case, Random, assert_close, evaluated, normal_form

from onnxmesh.compiler.api import compile_model
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.options import Options
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.session import Session

floats = Random().floats
TOKENS, HIDDEN, INNER, EXPERTS = 10, 8, 6, 4
X, ROUTER = floats(2, TOKENS // 2, HIDDEN), floats(TOKENS, EXPERTS)
FIRST, SECOND, THIRD = floats(EXPERTS, INNER, HIDDEN), floats(EXPERTS, HIDDEN, INNER), floats(EXPERTS, INNER, HIDDEN)
BIASES = [floats(EXPERTS, INNER), floats(EXPERTS, HIDDEN), floats(EXPERTS, INNER)]
PAIRS, PAIR_BIAS = np.stack([FIRST, THIRD], 2).reshape(EXPERTS, -1, HIDDEN), np.stack([BIASES[0], BIASES[2]], 2)
SWIGLU = {"activation_type": "swiglu", "activation_alpha": 1.7, "activation_beta": 1.0, "swiglu_limit": 0.8}
WEIGHTS = (2, 3, 4, 5, 6, 7)


def moe(*inputs: np.ndarray | None, x: np.ndarray = X, **attributes: Any) -> Case:
    known = tuple(i for i in WEIGHTS if i - 2 < len(inputs) and inputs[i - 2] is not None)
    return Case("moe", "MoE", [x, ROUTER, *inputs], {"k": 2, **attributes}, known=known)


def paired(**attributes: Any) -> Case:
    bias = PAIR_BIAS.reshape(EXPERTS, -1)
    return moe(PAIRS, bias, SECOND, BIASES[1], swiglu_fusion=1, normalize_routing_weights=1, **SWIGLU, **attributes)


@pytest.mark.parametrize("normalised", [0, 1])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
def test_same_numbers_as_onnxruntime(activation: str, k: int, normalised: int) -> None:
    attributes = {"activation_type": activation, "k": k, "normalize_routing_weights": normalised}
    for case in (
        moe(FIRST, BIASES[0], SECOND, BIASES[1], **attributes),
        moe(FIRST, None, SECOND, x=X.reshape(TOKENS, HIDDEN), **attributes),
    ):
        assert_close(evaluated(case), case.expected())


def test_two_layers_in_one_are_taken_apart() -> None:
    """As ONNX Runtime has them in pairs; in halves and apart it has them on GPUs only: the same numbers."""
    case = paired()
    expected = case.expected()
    assert_close(evaluated(case), expected)
    halves = np.concatenate([FIRST, THIRD], 1), np.concatenate([BIASES[0], BIASES[2]], 1)
    for inputs, fusion in (
        ((halves[0], halves[1], SECOND, BIASES[1]), 2),
        ((FIRST, BIASES[0], SECOND, BIASES[1], THIRD, BIASES[2]), 0),
    ):
        other = moe(*inputs, swiglu_fusion=fusion, normalize_routing_weights=1, **SWIGLU)
        assert_close(evaluated(other), expected)


@pytest.mark.parametrize(("axis", "ranks"), [("tp", 2), ("tp", 4), ("dp", 2)])
def test_experts_are_shared_out(axis: str, ranks: int) -> None:
    """On tp every rank holds its experts, and the ranks' results are summed; on dp it has its tokens."""
    case = paired()
    state = compile_model(case.model(), Options(Mesh.of(**{axis: ranks}), {}, {}))
    assert state.plan is not None
    (placed,) = state.placed
    with Session(state.plan) as session:
        found = dict(zip(case.expected(), session.run(None, case.feeds())))
    assert_close(found, case.expected())
    (node,) = (node for node in placed.views if node.op_type == "Experts")
    strategy = placed.strategies[node]
    assert strategy.factor == {"tp": "e", "dp": "t"}[axis]
    share = shares.shares(placed)
    assert share.flops_per_rank <= 1 / ranks + 0.05
    if axis == "tp":
        assert share.weights_per_rank == 1 / ranks


def quantised(bits: int, block: int, zeros: bool, weighed: bool = False, **attributes: Any) -> Case:
    """QMoE of 32 inputs, 16 inner features: every layer has 32 or 16 columns."""
    random, layers, zero_points = Random(), [], []
    for rows, columns in ((32 if attributes.get("swiglu_fusion") else 16, 32), (32, 16)):
        blocks = (columns // block,) if block else ()
        scale = np.abs(random.floats(EXPERTS, rows, *blocks)) / 2**bits
        layers += [random.below(256, EXPERTS, rows, columns * bits // 8).astype(np.uint8), scale.astype(np.float32)]
        layers += [random.floats(EXPERTS, rows)]
        packed = (rows, -(-blocks[0] * bits // 8)) if block else (rows * bits // 8,)
        zero_points += [random.below(256, EXPERTS, *packed).astype(np.uint8) if zeros else None]
    router = [np.abs(random.floats(TOKENS, EXPERTS))] if weighed else []
    inputs = [random.floats(TOKENS, 32), ROUTER, *layers, None, None, None, *zero_points, None, *router]
    known = tuple(i for i, x in enumerate(inputs) if x is not None and i > 1 and i != 14)
    blocks_of = {"block_size": block} if block else {}
    fields = {"k": 2, "expert_weight_bits": bits, "accuracy_level": 1, **blocks_of, **attributes}
    return Case("quantised moe", "QMoE", inputs, fields, known=known)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("block", "zeros"), [(0, False), (16, False), (0, True), (16, True)])
def test_weights_of_few_bits_are_dequantised_as_onnxruntime_does(bits: int, block: int, zeros: bool) -> None:
    case = quantised(bits, block, zeros, activation_type="silu", normalize_routing_weights=1)
    (found,), (wanted,) = evaluated(case).values(), case.expected().values()
    assert shares.relative_error(found, wanted) < (1e-5 if bits == 4 or not block else 2e-2)  # there in bytes


@pytest.mark.parametrize("normalised", [0, 1])
@pytest.mark.parametrize("weighed", [False, True])
def test_few_bits_beside_every_router(weighed: bool, normalised: int) -> None:
    pairs = {"activation_type": "swiglu", "swiglu_fusion": 1}
    case = quantised(4, 0, False, weighed, normalize_routing_weights=normalised, **pairs)
    assert_close(evaluated(case), case.expected())


def test_experts_of_few_bits_are_shared_out() -> None:
    case = quantised(4, 16, True, activation_type="silu")
    state = compile_model(case.model(), Options(Mesh.of(tp=2), {}, {}))
    assert state.plan is not None
    with Session(state.plan) as session:
        (found,) = session.run(None, case.feeds())
    assert_close({"y0": found}, case.expected())
    assert shares.shares(state.placed[0]).weights_per_rank == 0.5


def test_no_expert_is_lost_in_normal_form() -> None:
    """Weights stay recipes over those of the file: large ones are never copied."""
    graph = normal_form(paired()).graph
    (node,) = (node for node in graph if node.op_type == "Experts")
    assert all(v is None or v.is_initializer() for v in node.inputs[2:])


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"use_sparse_mixer": 1}, "sparse mixer"),
        ({"activation_type": "mish"}, "activation 'mish'"),
        ({"activation_type": "swiglu"}, "third layer"),
    ],
)
def test_what_is_not_supported_names_the_node(attributes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=rf"node 'n' \(com.microsoft::MoE\) .*{says}"):
        normal_form(moe(FIRST, None, SECOND, **attributes))
