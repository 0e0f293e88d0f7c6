"""Prove rules on the nodes of ONNX's own node tests, besides the samples that stand with them.

Every strategy that a rule offers for a node of a test, in normal form, runs on ranks with the test's numbers, and the
joined outputs are compared with the op's kernel on whole inputs. `python tests/node_rules.py [PATTERN...]` prints what
is wrong, and how many tests are run in parts.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from typing import Any

import evaluate
import numpy as np
import onnx.backend.test.loader
import onnx_ir as ir
import rule_checker

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.frontend import load
from onnxmesh.compiler.ir import rule
from onnxmesh.compiler.ir.rule import OpView, Strategy
from onnxmesh.compiler.ir.view import view_of
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.graph.deciding import deciding_inputs
from onnxmesh.passes.normalise.normalise import normalise
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.placement import Partial, Placement, cut, join, text

RANKS = 2
TOLERANCE = {8: 1e-6, 4: 1e-4, 2: 3e-2, 1: 0.3}
"""Of a float, by its bytes; relative, and absolute in the greatest of the numbers that go in."""


@dataclass(frozen=True)
class Checked:
    """One node of a test: the strategies that were right, and what was wrong with the others."""

    test: str
    view: OpView
    right: tuple[Strategy, ...]
    wrong: tuple[str, ...]


@cache
def tests() -> list[Any]:
    """The standard's node tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(onnx.backend.test.loader.load_model_tests(kind="node"))


def check(chosen: Iterable[Any]) -> Iterator[Checked]:
    """Every node that has a rule, of these tests; nodes that are alike are checked once."""
    known: dict[OpView, Checked] = {}
    for test in chosen:
        for node, inputs in _nodes(test):
            view = view_of(node, RANKS)
            if view not in known:
                known[view] = _checked(test.name, node, view, inputs)
            yield replace(known[view], test=test.name)


def _nodes(test: Any) -> Iterator[tuple[ir.Node, list[np.ndarray | None]]]:
    """The nodes with a rule and their inputs, where all are tensors that a kernel of ours computes."""
    model = load(test.model)
    given = dict(zip([v.name for v in model.graph.inputs], test.data_sets[0][0]))
    if not all(isinstance(x, np.ndarray | np.generic) for x in given.values()):
        return
    arrays = {name: np.asarray(x) for name, x in given.items()}
    try:
        model = normalise(bind(model, {}, {}, {name: arrays[name] for name in deciding_inputs(model)}))
        with np.errstate(all="ignore"):
            values = evaluate.evaluate(model, arrays, keep=True)
    except (ModelError, PlanError, NotImplementedError):
        return  # it holds what is no tensor, or an op that ONNX's reference computes
    for node in model.graph:
        if rule.find(node.op_type) is not None and all(v.shape is not None for v in node.outputs):
            yield node, [None if v is None else values[v.name or ""] for v in node.inputs]


def _checked(test: str, node: ir.Node, view: OpView, inputs: Sequence[np.ndarray | None]) -> Checked:
    right, wrong = [], []
    for strategy in rule_checker.strategies(view):
        if strategy != rule.replicate(view) and (given := _given(node, inputs, strategy)) is not None:
            message = _compared(node, strategy, given)
            if message:
                wrong.append(f"{test}: {node.op_type}, {_text(strategy.ins)} -> {_text(strategy.outs)}: {message}")
            else:
                right.append(strategy)
    return Checked(test, view, tuple(right), tuple(wrong))


def _text(placements: Iterable[Placement]) -> str:
    return ", ".join(text(p, RANKS) for p in placements)


def _given(
    node: ir.Node, inputs: Sequence[np.ndarray | None], strategy: Strategy
) -> list[list[rule_checker.Scattered] | None] | None:
    """The inputs and their pieces; None where one value would be wanted in two placements, or cannot be summands."""
    placed = [(v, p) for v, p in zip(node.inputs, strategy.ins) if v is not None]
    if len(dict(placed)) < len(set(placed)):
        return None
    partial = [x for x, p in zip(inputs, strategy.ins) if isinstance(p, Partial) and x is not None]
    if any(x.dtype.kind in "biu" for x in partial):
        return None
    return [None if x is None else [_scattered(x, p)] for x, p in zip(inputs, strategy.ins)]


def _scattered(x: np.ndarray, placement: Placement) -> rule_checker.Scattered:
    if not isinstance(placement, Partial):
        return x, [cut(x, placement, RANKS, rank, np) for rank in range(RANKS)]
    part = np.random.default_rng(0).standard_normal(x.shape).astype(x.dtype)
    pieces = [part, (x - part).astype(x.dtype)] if placement.op == "sum" else [x, x]
    return join(pieces, placement, np), pieces


def _compared(node: ir.Node, strategy: Strategy, given: list[list[rule_checker.Scattered] | None]) -> str:
    greatest = max((_size(each[0][0]) for each in given if each is not None), default=1.0)
    try:
        with np.errstate(all="ignore"):
            for name, joined, whole in rule_checker.results(node, strategy, RANKS, given):
                if joined.shape != whole.shape or joined.dtype != whole.dtype:
                    return f"{name} is {joined.dtype}{joined.shape}, not {whole.dtype}{whole.shape}"
                if not _close(joined, whole, greatest):
                    return f"{name} differs"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _size(x: np.ndarray) -> float:
    """The greatest finite absolute value, at least 1."""
    if x.dtype.kind in "bOSU" or x.size == 0:
        return 1.0
    sizes = np.abs(x.astype(np.float64))
    return float(np.max(sizes, initial=1.0, where=np.isfinite(sizes)))


def _close(a: np.ndarray, b: np.ndarray, greatest: float) -> bool:
    if a.dtype.kind in "biu":
        return bool(np.array_equal(a, b))
    tolerance = TOLERANCE[a.dtype.itemsize]
    return bool(
        np.allclose(a.astype(np.float64), b.astype(np.float64), tolerance, tolerance * greatest, equal_nan=True)
    )


def main(patterns: Sequence[str]) -> int:
    """Check the tests whose names match; print what is wrong and how much is shared out."""
    found = list(check(test for test in tests() if any(fnmatch(test.name, p) for p in patterns or ["*"])))
    wrong = sorted({message for each in found for message in each.wrong})
    print(*wrong, sep="\n")
    shared = [each for each in found if each.right]
    cases = sum({each.view: len(each.right) + len(each.wrong) for each in found}.values())
    ops, names = {each.view.op for each in shared}, {each.test for each in shared}
    print(f"{len(names)} tests are shared out on {RANKS} ranks, by {len(ops)} ops; {cases} cases, {len(wrong)} wrong")
    print(f"offered nothing by these tests: {' '.join(sorted({each.view.op for each in found} - ops))}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
