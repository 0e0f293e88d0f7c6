"""Look for missing rules: placements for which an op, run as it is on local shapes, is right, yet never offered.

Brute force over small placements on two ranks: inputs R, plain cuts of each dim and Partial sums, outputs plain cuts
and Partials; where there are few inputs, also cuts of both halves of a dim. `python tests/rule_gaps.py [OP...]` prints
what is found, and what it would gain; `--store` puts that into docs/rules.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import onnx_ir as ir
import rules_left_out
from lockstep import attributes
from rule_checker import DOCUMENT, equal, node_of, scattered, strategies

from onnxmesh.backend.scoreboard import put
from onnxmesh.compiler import cost
from onnxmesh.compiler.ir.rule import OpView, Strategy
from onnxmesh.compiler.ir.view import view_of
from onnxmesh.compiler.ops.samples import Sample, Tensor, by_op
from onnxmesh.runtime.kernels.registry import Call, TensorType, find
from onnxmesh.runtime.placement import Partial, Placement, R, Segment, Shard, join, local_shape, text

RANKS = 2
MOST_INPUTS, MOST_SEGMENTED = 3, 2
Placements = tuple[Placement, ...]

HEAD = (
    "| op | missing | spares of the work | of the inputs | the rule spares of the work | of the inputs |",
    "|---|---|---|---|---|---|",
)


Share = tuple[float, float]


@dataclass(frozen=True, order=True)
class Gap:
    """A missing rule.

    Attributes:
        text: its placements, as `S(0), R -> S(0)`.
        spared: the parts of the work and of the inputs that it would spare each of two ranks.
        offered: what the op's rule spares at most.
    """

    op: str
    text: str
    spared: Share
    offered: Share

    @property
    def row(self) -> str:
        """A row of the table in docs/rules.md."""
        cells = [f"{share:.0%}" for share in (*self.spared, *self.offered)]
        return f"| {self.op} | {self.text} | {' | '.join(cells)} |"


def gaps(sample: Sample) -> list[Gap]:
    """The right placements that no strategy offers."""
    if len(sample.ins) > MOST_INPUTS or not all(prod(t.shape) for t in sample.ins if t is not None):
        return []
    node = node_of(sample)
    view = view_of(node, RANKS)
    ways = strategies(view)
    offered = {(s.ins, s.outs) for s in ways}
    most = max(spared(view, way) for way in ways)
    return [
        Gap(sample.op, _text(ins, outs), spared(view, Strategy("", ins, outs)), most)
        for ins, outs in _placements(sample)
        if (ins, outs) not in offered and all(_is_right(node, sample, ins, outs, seed) for seed in range(3))
    ]


def of_op(op: str) -> list[Gap]:
    """The gaps of all samples of an op; of those with one text, the one that would gain most."""
    found: dict[str, Gap] = {}
    for sample in by_op()[op]:
        for gap in gaps(sample):
            if gap.text not in found or gap.spared > found[gap.text].spared:
                found[gap.text] = gap
    return sorted(found.values())


def spared(view: OpView, strategy: Strategy) -> Share:
    """What one rank need not do of the node, and what it need not hold of its inputs.

    The work is flops, or bytes that are read and written where there are none.
    """
    local, flops = cost.local_view(view, strategy), cost.flops(view)
    done = cost.strategy_flops(view, strategy) / flops if flops else cost.traffic(local) / cost.traffic(view)
    held = [sum(cost.nbytes(shape, "int8") for shape in each.ins if shape is not None) for each in (view, local)]
    return 1 - done, 1 - held[1] / (held[0] or 1)


def _text(ins: Placements, outs: Placements) -> str:
    """`S(0), R, S(1) -> S(0)`; inputs at the end that are R are left out. Two equal segments are `halves`."""
    while ins[-1] == R:
        ins = ins[:-1]
    return " -> ".join(", ".join(map(_placement, placed)) for placed in (ins, outs))


def _placement(placement: Placement) -> str:
    halved = isinstance(placement, Shard) and len(placement.segments) > 1
    return f"S({placement.dim}; halves)" if halved else text(placement, RANKS)


def _placements(sample: Sample) -> Iterator[tuple[Placements, Placements]]:
    """What to try: something is cut or Partial, and no output is what an all-reduce of nothing would be."""
    segmented = len(sample.ins) <= MOST_SEGMENTED
    for ins in product(*(_of_input(t, segmented) for t in sample.ins)):
        if all(p == R for p in ins):
            continue
        for outs in product(*(_of_output(t, ins, segmented) for t in sample.outs)):
            yield ins, outs


def _of_input(tensor: Tensor | None, segmented: bool) -> list[Placement]:
    if tensor is None:
        return [R]
    return [
        R,
        *_cuts(tensor, segmented),
        *([Partial()] if tensor.kind in ("f", "h", "p") and not tensor.constant else []),
    ]


def _of_output(tensor: Tensor, ins: Placements, segmented: bool) -> list[Placement]:
    reductions = ["sum"] if tensor.kind != "b" else []
    if any(isinstance(p, Shard) for p in ins):
        reductions += ["max", "min"]
    return [*_cuts(tensor, segmented), *(Partial(reduction) for reduction in reductions)]


def _cuts(tensor: Tensor, segmented: bool) -> list[Placement]:
    plain = [Shard.plain(dim, size) for dim, size in enumerate(tensor.shape) if size >= RANKS and size % RANKS == 0]
    halved = (dim for dim, size in enumerate(tensor.shape) if size and size % (2 * RANKS) == 0)
    return [*plain, *(Shard(dim, (Segment(tensor.shape[dim] // 2),) * 2) for dim in halved if segmented)]


def _is_right(node: ir.Node, sample: Sample, ins: Placements, outs: Placements, seed: int) -> bool:
    """Whether the op on local shapes gives the pieces of the whole result, for random numbers."""
    rng = np.random.default_rng(seed)
    wholes, pieces = [], []
    for tensor, placement in zip(sample.ins, ins):
        whole, parts = (None, [None] * RANKS) if tensor is None else scattered(tensor, placement, RANKS, rng)
        wholes.append(whole)
        pieces.append(parts)
    try:
        with np.errstate(all="ignore"):
            want = _results(node, wholes, [t.shape for t in sample.outs])
            shapes = [local_shape(t.shape, p, RANKS) for t, p in zip(sample.outs, outs)]
            got = [_results(node, [parts[rank] for parts in pieces], shapes) for rank in range(RANKS)]
            return all(equal(join([result[i] for result in got], outs[i], np), whole) for i, whole in enumerate(want))
    except (ArithmeticError, AssertionError, IndexError, TypeError, ValueError):
        return False


def _results(
    node: ir.Node, inputs: Sequence[np.ndarray | None], shapes: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, ...]:
    outs = tuple(TensorType(value.dtype.numpy(), shape) for value, shape in zip(node.outputs, shapes))
    result = find(node.op_type)(Call(np, attributes(node), outs, {}), *inputs)
    results = result if isinstance(result, tuple) else (result,)
    assert all(array.shape == shape for array, shape in zip(results, shapes))
    return results


# --- the table ----------------------------------------------------------------------------------------------


def searched() -> list[str]:
    """The ops to look at: those whose samples stand on one axis. Of CastLike any placement of the like is right."""
    return sorted(op for op, found in by_op().items() if found[0].first == 1 and op != "CastLike")


def table() -> str:
    """All gaps as Markdown, by why they are left out."""
    found = [gap for op in searched() for gap in of_op(op)]
    parts = []
    for why in dict.fromkeys([*rules_left_out.LEFT_OUT, ""]):
        rows = [gap.row for gap in found if rules_left_out.reason(gap.op, gap.text) == why]
        if rows:
            parts += [f"{why[:1].upper()}{why[1:] or 'Unknown'}:", "\n".join([*HEAD, *rows])]
    return "\n\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    """Print the gaps of some ops, or of all; `--store` puts them into the document."""
    if arguments == ["--store"]:
        put(DOCUMENT, table(), "gaps")
        return
    for op in arguments or searched():
        print("".join(f"{gap.row}\n" for gap in of_op(op)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
