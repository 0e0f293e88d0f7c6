"""MatMul and Einsum alike: which dims of the operands are shared, kept and summed over."""

from __future__ import annotations

import string
from dataclasses import dataclass

import onnx_ir as ir

from onnxmesh.passes.graph.match import given, shape_of


@dataclass(frozen=True, slots=True)
class Contraction:
    """A product of two operands; a label (one character) per dim of each operand and of the output."""

    node: ir.Node
    operands: tuple[ir.Value, ir.Value]
    labels: tuple[str, str]
    out: str

    @property
    def summed(self) -> str:
        """The labels that are summed over."""
        return "".join(c for c in self.labels[0] if c in self.labels[1] and c not in self.out)

    def sizes(self) -> dict[str, int]:
        """The size of each label of the output and of the summed ones."""
        result: dict[str, int] = {}
        for value, labels in zip(self.operands, self.labels):
            for name, size in zip(labels, shape_of(value)):
                result[name] = max(size, result.get(name, 1))
        return result


def contraction(node: ir.Node | None) -> Contraction | None:
    """The contraction that a MatMul or a two-operand Einsum computes."""
    if node is None or len(node.inputs) != 2 or node.op_type not in ("MatMul", "Einsum"):
        return None
    operands = given(node, 0), given(node, 1)
    ranks = len(shape_of(operands[0])), len(shape_of(operands[1]))
    if node.op_type == "Einsum":
        return _einsum(node, operands, ranks)
    if min(ranks) < 2:
        return None
    batch = string.ascii_uppercase[: max(ranks) - 2]
    first = batch[len(batch) + 2 - ranks[0] :] + "mk"
    second = batch[len(batch) + 2 - ranks[1] :] + "kn"
    return Contraction(node, operands, (first, second), batch + "mn")


def _einsum(node: ir.Node, operands: tuple[ir.Value, ir.Value], ranks: tuple[int, int]) -> Contraction | None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    if "..." in equation or "->" not in equation:
        return None
    inputs, out = equation.split("->")
    first, second = inputs.split(",")
    if any(len(set(labels)) != len(labels) for labels in (first, second, out)):
        return None
    if (len(first), len(second)) != ranks or not set(out) <= set(first + second):
        return None
    alone = set(first) ^ set(second)
    return Contraction(node, operands, (first, second), out) if alone <= set(out) else None
