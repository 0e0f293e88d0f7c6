"""Every rule proven against its op, and the rules that are missing, each with the reason."""

from __future__ import annotations

import pytest
import rule_checker
import rule_gaps
import rules_left_out

import onnxmesh.compiler.ops.table  # noqa: F401
from onnxmesh.compiler.ir import rule
from onnxmesh.compiler.ops.samples import by_op, samples
from onnxmesh.runtime.kernels import registry

SAMPLES = by_op()
EXPECTED_CASES = 12000

NO_RULE = {"Reference"}
"""Ops with a kernel that run replicated, and the report says so; Reference is any op that onnx itself computes."""

NO_SAMPLE = {"Dropout"}
"""Ops with a rule that no normal form holds."""


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


@pytest.mark.parametrize("op", rule_gaps.searched())
def test_no_other_rule_is_missing(op: str) -> None:
    found = rule_gaps.of_op(op)
    assert [gap.text for gap in found] == rules_left_out.known(op)
    document = rule_gaps.DOCUMENT.read_text()
    assert not [gap.row for gap in found if gap.row not in document], "python tests/rule_gaps.py --store"


def test_the_checker_finds_a_wrong_strategy() -> None:
    softmax = next(sample for sample in SAMPLES["Softmax"])
    add = next(sample for sample in SAMPLES["Add"])
    right = next(case for case in rule_checker.cases(add) if case.strategy.factor == "2")
    wrong = rule_checker.Case(
        softmax, 2, rule.Strategy("?", (right.strategy.ins[1].moved(1),), (right.strategy.outs[0].moved(1),))
    )
    assert "y0 differs" in rule_checker.check(wrong)
    assert not rule_checker.check(right)
