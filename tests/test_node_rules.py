"""The rules on the nodes of ONNX's own node tests: whatever is offered is right."""

from __future__ import annotations

import node_rules
import pytest

from onnxmesh.compiler.ir import rule

PARTS = 8
OPS = 120
"""So many ops have a rule at least."""


@pytest.mark.parametrize("part", range(PARTS))
def test_every_strategy_is_right_on_the_nodes_of_the_standard(part: int) -> None:
    tests = sorted(node_rules.tests(), key=lambda test: str(test.name))
    size = -(-len(tests) // PARTS)
    found = list(node_rules.check(tests[part * size : (part + 1) * size]))
    wrong = sorted({message for each in found for message in each.wrong})
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:5])
    assert sum(bool(each.right) for each in found) > len(found) / 2


def test_most_ops_have_a_rule() -> None:
    assert len(rule.names()) > OPS
