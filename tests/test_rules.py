"""Every rule proven against its op, and the rules that are missing, each with the reason."""

from __future__ import annotations

import pytest
import rule_checker
import rule_gaps

import onnxmesh.compiler.ops.table  # noqa: F401
from onnxmesh.compiler.ir import rule
from onnxmesh.compiler.ops.samples import by_op, samples
from onnxmesh.runtime.kernels import registry

SAMPLES = by_op()
EXPECTED_CASES = 8000

NO_RULE = {"Reference"}
"""Ops with a kernel that run replicated, and the report says so; Reference is any op that onnx itself computes."""

NO_SAMPLE = {"Dropout"}
"""Ops with a rule that no normal form holds."""

GAPS: dict[str, dict[str, list[str]]] = {
    "Partial is better reduced before: the op makes no tensor smaller": {
        "AffineGrid": ["P -> P"],
        "AveragePool": ["P -> P"],
        "CumSum": ["P -> P"],
        "LinearAttention": ["R, P -> P, P", "R, R, P -> P, P"],
        "NegativeLogLikelihoodLoss": ["P -> P", "R, R, P -> P", "R, R, P -> P, P"],
        "GatherElements": ["P -> P"],
        "TensorScatter": ["P, P -> P"],
        "GridSample": ["P -> P"],
        "MaxUnpool": ["P -> P"],
        "Resize": ["P -> P"],
        "ReverseSequence": ["P -> P"],
        "RoiAlign": ["P -> P"],
        "Rotary": ["P -> P", "R, P, P -> P"],
        "ScatterElements": ["P, R, P -> P", "P, S(1), S(1) -> P"],
        "ScatterND": ["P, R, P -> P"],
        "Pad": ["P, P -> P"],
        "OneHot": ["R, R, P -> P"],
        "Fused": ["R, P -> P"],
        "AttentionFinish": ["P -> P"],
    },
    "right up to rounding only: nothing Partial goes through a Cast": {
        "Cast": ["P -> P"],
    },
    "scales and biases are constants, which are never Partial": {
        "GroupNormalization": ["R, P, P -> P"],
        "InstanceNormalization": ["R, P, P -> P"],
        "LayerNormalization": ["R, P, P -> P"],
        "RMSNormalization": ["R, P -> P"],
    },
    "the scores, most of the work, would be computed by every rank": {
        "Attention": ["R, R, P -> P", "R, R, S(3) -> S(3)"],
    },
    "the features of one head are never cut": {
        "AttentionFinish": ["S(3) -> S(3)"],
        "LinearAttention": ["S(4), S(3) -> P, S(2)"],
        "Rotary": ["S(3), S(2), S(2) -> S(3)", "S(3), S(3), S(3) -> S(3)"],
    },
    "space is cut only where windows do not overlap and matter: in the Conv of patches": {
        "ConvTranspose": ["S(2) -> S(2)"],
        "DepthToSpace": ["S(2) -> S(2)", "S(3) -> S(3)"],
        "GlobalMaxPool": ["S(2) -> P(max)"],
        "MaxPool": ["S(2) -> S(2)"],
        "Resize": ["S(2) -> S(2)"],
        "SpaceToDepth": ["S(2) -> S(2)", "S(3) -> S(3)"],
    },
    "strided slices take features apart; their dim stays whole": {
        "Slice": ["S(0) -> S(0)"],
    },
    "`auto_pad` counts as padding, even where it comes to none": {
        "Conv": ["S(2) -> S(2)"],
    },
}


def test_every_rule_has_samples_and_every_sample_a_rule() -> None:
    offering = {op for op in rule.names() if _offers(rule.find(op))}
    assert offering - set(SAMPLES) == NO_SAMPLE
    assert set(SAMPLES) <= offering


def _offers(op: rule.Rule | None) -> bool:
    """Whether a rule has strategies; those of fused ops, which stand in no graph that is placed, have none."""
    return op is not None and any((op.factors, op.ports, op.pairs))


def test_the_kernels_without_a_rule_are_known() -> None:
    assert registry.names() - rule.names() == NO_RULE


@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_every_strategy_of_the_rule_is_right(op: str) -> None:
    wrong = [
        message
        for sample in SAMPLES[op]
        for case in rule_checker.cases(sample)
        if (message := rule_checker.check(case))
    ]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:5])


def test_enough_is_proven() -> None:
    assert sum(1 for sample in samples() for _ in rule_checker.cases(sample)) > EXPECTED_CASES


def known_gaps(op: str) -> list[str]:
    return sorted(gap for ops in GAPS.values() for gap in ops.get(op, []))


@pytest.mark.parametrize("op", sorted(op for op in SAMPLES if SAMPLES[op][0].first == 1))
def test_no_other_rule_is_missing(op: str) -> None:
    if op == "CastLike":
        pytest.skip("the values of its second input mean nothing: any placement is right")
    assert sorted({gap for sample in SAMPLES[op] for gap in rule_gaps.gaps(sample)}) == known_gaps(op)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMax", "ArgMax"])
def test_what_ranks_cannot_reduce_is_not_cut(op: str) -> None:
    """No reduction over ranks is defined for 16-bit integers."""
    attrs = (("axis", 1), ("axes", (1,)), ("keepdims", 1))
    view = rule.OpView(op, ((4, 12),), ((4, 1),), ("uint16",), ("uint16",), (False,), attrs, 2)
    offered = {strategy.factor for strategy in rule_checker.strategies(view)}
    assert offered == {"replicate", "0"}


def test_the_checker_finds_a_wrong_strategy() -> None:
    softmax = next(sample for sample in SAMPLES["Softmax"])
    add = next(sample for sample in SAMPLES["Add"])
    right = next(case for case in rule_checker.cases(add) if case.strategy.factor == "2")
    wrong = rule_checker.Case(
        softmax, 2, rule.Strategy("?", (right.strategy.ins[1].moved(1),), (right.strategy.outs[0].moved(1),))
    )
    assert "y0 differs" in rule_checker.check(wrong)
    assert not rule_checker.check(right)
