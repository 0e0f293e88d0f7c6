"""Node tests of the standard on two ranks: every node in turn by every factor that its rule lets it be cut by.

A model is compiled as on one rank up to its normal form. Then the strategies of its nodes are not chosen but given: in
round i every node runs in the i-th of its ways, what has fewer is replicated. Placements that do not fit are resharded,
as anywhere. The outputs are compared with those of one rank.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxmesh.backend import suite
from onnxmesh.backend.processes import spread
from onnxmesh.compiler import api
from onnxmesh.compiler.ir import rule
from onnxmesh.compiler.ir.loose import LOOSE, REFERENCE, loose_type, onnx_op, why_apart
from onnxmesh.compiler.ir.rule import Strategy
from onnxmesh.compiler.ir.view import is_constant, view_of
from onnxmesh.compiler.moves import moves
from onnxmesh.passes.place.candidates import enumerate_strategies
from onnxmesh.passes.place.tie import tie
from onnxmesh.runtime.placement import Partial, Shard, text
from onnxmesh.runtime.session import Session

AXIS, RANKS = "tp", 2
ROUNDING = 8
"""Floats may differ by so many units in the last place of the output's largest, unless they were only moved."""


@dataclass(frozen=True)
class Outcome:
    """What one test showed.

    Attributes:
        operator: the test's, where its model has nodes of only one.
        cut: (op in normal form, ways in which it was run), for those that were cut.
        whole: (op in normal form, whether it has a rule, why every rank computes it), for the others.
        wrong: what differs from one rank.
    """

    name: str
    operator: str = ""
    cut: tuple[tuple[str, int], ...] = ()
    whole: tuple[tuple[str, bool, str], ...] = ()
    wrong: tuple[str, ...] = ()


def names() -> list[str]:
    """The node tests."""
    return [name for name, kind in suite.names().items() if kind == "node"]


def run(wanted: Sequence[str], processes: int | None = None) -> list[Outcome | None]:
    """Run tests in several processes; one for each CPU without a number."""
    suite.names()  # the processes inherit them
    return spread(run_one, wanted, processes or os.cpu_count() or 1, _died)


def _died(name: str, code: int | None) -> Outcome:
    return Outcome(name, wrong=(f"its process ended with exit code {code}",))


def run_one(name: str) -> Outcome | None:
    """Run one test; None where it does not run on one rank either."""
    runs = suite.runs(name)
    if not runs:
        return None
    cut: Counter[str] = Counter()
    whole: dict[str, tuple[bool, str]] = {}
    wrong: list[str] = []
    for one in runs:
        begun = api.begin(one.rep.model, one.rep.options(one.rep.feeds(one.inputs)))
        ways = ways_of(begun.loaded.graph)
        for node, found in ways.items():
            op = onnx_op(node)
            cut[op] += len(found)
            if not found:
                whole[op] = (rule.find(node.op_type) is not None, why_whole(node))
        wrong += differences(one, begun, ways)
    return Outcome(
        name,
        operator_of(runs[0].rep.model),
        tuple((op, count) for op, count in sorted(cut.items()) if count),
        tuple((op, *why) for op, why in sorted(whole.items()) if not cut[op]),
        tuple(wrong),
    )


def operator_of(model: Any) -> str:
    """The one operator that the nodes of a model have; empty where they have several."""
    assert isinstance(model, onnx.ModelProto)
    found = {f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph.node}
    return found.pop() if len(found) == 1 else ""


def why_whole(node: ir.Node) -> str:
    """Why every rank computes a node that no strategy cuts."""
    if rule.find(node.op_type) is not None:
        return "none of its dims can be cut for two ranks"
    if not node.op_type.startswith((LOOSE, REFERENCE)):
        return why_apart(node.op_type) or f"no rule for {node.op_type}"
    ports = (value for value in (*node.inputs, *node.outputs) if value is not None)
    said = " ".join([node.op_type, *(kind.text for value in ports if (kind := loose_type(value)))])
    return next(why for word, why in _APART.items() if word in said)


_APART = {
    "Optional": "it works on an optional",
    "optional(": "it works on an optional",
    "seq(": "it works on a sequence",
    "string": "it works on strings",
    REFERENCE: "onnx.reference computes it on the host: there is no kernel",
    LOOSE: "the size of its result, or of what it reads, depends on data",
}
"""Why a node is set apart, by a word in its name or in the types that it works on; the first that fits."""


# --- strategies ---------------------------------------------------------------------------------------------


def ways_of(graph: ir.Graph) -> dict[ir.Node, list[Strategy]]:
    """The strategies that cut each node of a graph in normal form; nodes that only name constants are left out."""
    quotient = tie(graph, RANKS)
    space = enumerate_strategies(quotient)
    return {
        node: [s for s in space.strategies[index] if _can_be_forced(node, s)]
        for node, index in quotient.class_of.items()
        if node.op_type != "Identity" or not is_constant(node.inputs[0])
    }


def _can_be_forced(node: ir.Node, strategy: Strategy) -> bool:
    """Whether something is cut, and no input is a sum of what ranks hold: nothing leads to that."""
    placed = zip(node.inputs, strategy.ins)
    sums = any(isinstance(p, Partial) and not is_constant(value) for value, p in placed if value is not None)
    return not sums and any(isinstance(p, Shard) for p in strategy.ins + strategy.outs)


def rounds(ways: Mapping[ir.Node, Sequence[Strategy]]) -> Iterator[dict[ir.Node, Strategy]]:
    """A strategy for every node, and then the next one, until every node has had all of its own."""
    for chosen in zip_longest(*ways.values()):
        yield dict(zip(ways, chosen))


# --- the comparison -----------------------------------------------------------------------------------------


def differences(one: suite.Run, begun: api.Compilation, ways: Mapping[ir.Node, Sequence[Strategy]]) -> Iterator[str]:
    """What is wrong in any round."""
    for chosen in rounds(ways):
        cut = {node: strategy for node, strategy in chosen.items() if strategy is not None}
        try:
            outputs = _outputs(one, begun, cut)
        except Exception as error:
            yield f"{_text(cut)}: {type(error).__name__}: {error}"
            continue
        rounding = 0 if all(moves(node) or node.op_type in _MOVING for node in cut) else ROUNDING
        pairs = enumerate(zip(outputs, one.outputs, strict=True))
        unequal = [str(i) for i, (a, b) in pairs if not equal(a, b, rounding)]
        if unequal:
            yield f"{_text(cut)}: output {', '.join(unequal)} differs"


def _outputs(one: suite.Run, begun: api.Compilation, cut: Mapping[ir.Node, Strategy]) -> list[Any]:
    """What two ranks give when some nodes are cut, and the others replicated."""
    whole = {node: rule.replicate(view_of(node, RANKS)) for node in begun.loaded.graph if node not in cut}
    plan = api.forced(begun, AXIS, RANKS, {**whole, **cut}).plan
    assert plan is not None
    with Session(plan) as session:
        return session.run(None, one.rep.feeds(one.inputs))


_MOVING = frozenset("Concat DepthToSpace Gather GatherElements GatherND Pad SpaceToDepth Tile Trilu Where".split())
"""Ops that move numbers and are no windows of what they read."""


def equal(found: Any, expected: Any, rounding: int = ROUNDING) -> bool:
    """Whether two outputs are: floats up to so many units in the last place, everything else exactly."""
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(equal, found, expected))
    if not isinstance(expected, np.ndarray):
        return bool(found is expected or found == expected)
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    if not _is_float(expected.dtype):
        return bool(np.array_equal(found, expected))
    wide = expected.astype(np.float64)
    atol = rounding * float(ml_dtypes.finfo(expected.dtype).eps) * np.abs(wide[np.isfinite(wide)]).max(initial=0)
    return bool(np.allclose(found.astype(np.float64), wide, rtol=0, atol=atol, equal_nan=True))


def _is_float(dtype: np.dtype[Any]) -> bool:
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True


def _text(cut: Mapping[ir.Node, Strategy]) -> str:
    return "; ".join(f"{node.op_type} by {strategy.factor}: {_placements(strategy)}" for node, strategy in cut.items())


def _placements(strategy: Strategy) -> str:
    ins, outs = (", ".join(text(p, RANKS) for p in placed) for placed in (strategy.ins, strategy.outs))
    return f"{ins} -> {outs}"
