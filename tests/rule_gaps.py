"""Look for missing rules: placements for which an op, run as it is on local shapes, is right, yet never offered.

Brute force over small placements on two ranks: inputs R, plain cuts of each dim and Partial sums, outputs plain cuts
and Partials. `python tests/rule_gaps.py [OP...]` prints what is found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import numpy as np
import onnx_ir as ir
from lockstep import attributes
from rule_checker import equal, node_of, scattered, strategies

from onnxmesh.compiler.ir.view import view_of
from onnxmesh.compiler.ops.samples import Sample, Tensor, samples
from onnxmesh.runtime.kernels.registry import Call, TensorType, find
from onnxmesh.runtime.placement import Partial, Placement, R, Shard, join, local_shape, text

RANKS = 2
MOST_INPUTS = 3
Placements = tuple[Placement, ...]


def gaps(sample: Sample) -> list[str]:
    """The right placements that no strategy offers, as `S(0), R -> S(0)`.

    Inputs at the end that are R are left out of the text.
    """
    if len(sample.ins) > MOST_INPUTS or not all(prod(t.shape) for t in sample.ins if t is not None):
        return []
    node = node_of(sample)
    offered = {(s.ins, s.outs) for s in strategies(view_of(node, RANKS))}
    found = []
    for ins, outs in _placements(sample):
        if (ins, outs) not in offered and all(_is_right(node, sample, ins, outs, seed) for seed in range(3)):
            found.append(f"{_text(_trimmed(ins))} -> {_text(outs)}")
    return found


def _trimmed(placements: Placements) -> Placements:
    return _trimmed(placements[:-1]) if placements[-1] == R else placements


def _text(placements: Placements) -> str:
    return ", ".join(text(p, RANKS) for p in placements)


def _placements(sample: Sample) -> Iterator[tuple[Placements, Placements]]:
    """What to try: something is cut or Partial, and no output is what an all-reduce of nothing would be."""
    for ins in product(*(_of_input(t) for t in sample.ins)):
        if all(p == R for p in ins):
            continue
        for outs in product(*(_of_output(t, ins) for t in sample.outs)):
            yield ins, outs


def _of_input(tensor: Tensor | None) -> list[Placement]:
    if tensor is None:
        return [R]
    return [R, *_cuts(tensor), *([Partial()] if tensor.kind in ("f", "h", "p") and not tensor.constant else [])]


def _of_output(tensor: Tensor, ins: Placements) -> list[Placement]:
    reductions = ["sum"] if tensor.kind != "b" else []
    if any(isinstance(p, Shard) for p in ins):
        reductions += ["max", "min"]
    return [*_cuts(tensor), *(Partial(reduction) for reduction in reductions)]


def _cuts(tensor: Tensor) -> list[Placement]:
    return [Shard.plain(dim, size) for dim, size in enumerate(tensor.shape) if size >= RANKS and size % RANKS == 0]


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


def main(ops: Sequence[str]) -> None:
    """Print the gaps of `ops`, or of all."""
    for sample in samples():
        if (not ops or sample.op in ops) and sample.first == 1:
            for found in gaps(sample):
                print(f"{sample}: {found}")


if __name__ == "__main__":
    main(sys.argv[1:])
