"""Prove rules against the ops themselves.

For every sample node and every strategy that its rule offers, random inputs are cut as the strategy says, the local
computation runs as the compiler would make it (passes/partition/partition.py), on all ranks in lockstep, and the joined
outputs are compared with the op's kernel on whole inputs. `python tests/rule_checker.py [OP...]` prints a summary,
with `--store` into docs/rules.md.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import lockstep
import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import convert_attributes

import onnxmesh.compiler.ops.table  # noqa: F401
from onnxmesh.backend.scoreboard import ROOT, put
from onnxmesh.compiler.ir import rule, segments
from onnxmesh.compiler.ir.recipe import get as recipe_of
from onnxmesh.compiler.ir.rule import OpView, Port, Strategy
from onnxmesh.compiler.ir.view import dtype_of, ir_dtype, numpy_dtype, view_of
from onnxmesh.compiler.ops.samples import Sample, Tensor, samples
from onnxmesh.passes.partition import partition
from onnxmesh.passes.partition.local import Local
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial, Placement, Segment, Segments, Shard, cut, join, local_shape, text
from onnxmesh.runtime.recipe import evaluate_shard

RANKS = (2, 3, 4)
AXIS, FIRST_AXIS = "tp", "cp"
CUTS_PER_DIM = 10
DOCUMENT = ROOT / "docs" / "rules.md"
TOLERANCE = {"float32": (1e-4, 1e-5), "float16": (4e-3, 4e-3)}


@dataclass(frozen=True)
class Case:
    """One strategy of one sample on an axis of so many ranks."""

    sample: Sample
    ranks: int
    strategy: Strategy

    def __str__(self) -> str:
        strategy = self.strategy
        ins, outs = (", ".join(text(p, self.ranks) for p in placements) for placements in (strategy.ins, strategy.outs))
        how = f" by {strategy.expand}" if strategy.expand else ""
        return f"{self.sample} on {self.ranks} ranks, factor {strategy.factor}{how}: {ins} -> {outs}"


# --- strategies -----------------------------------------------------------------------------------------------


def cuts(size: int, ranks: int) -> list[Segments]:
    """Cuts of a dim to try: the natural ones, uneven segments, whole ones, copies on some ranks, and mixtures."""
    rest = size % ranks or ranks
    tried: list[Segments] = [
        *segments.natural(size, ranks),
        (Segment(ranks), Segment(size - ranks)),
        (Segment(12), Segment(size - 12)),
        (Segment(12), Segment(size - 24), Segment(12)),
        (Segment(size // 2),) * 2 if size % 2 == 0 else (),
        (Segment(size // 3),) * 3 if size % 3 == 0 else (),
        (Segment(rest, ranks), Segment(size - rest)),
        (Segment(size - rest), Segment(rest, ranks)),
        (Segment(size, 2),),
        (Segment(2, 2), Segment(size - 2)),
    ]
    return [cut for cut in dict.fromkeys(tried) if cut and segments.fits(cut, ranks)]


def strategies(view: OpView) -> list[Strategy]:
    """Every strategy that follows from `cuts` and Partial at any port, carried from port to port."""
    op = rule.find(view.op)
    assert op is not None, f"no rule for {view.op}"
    shapes = {Port(False, i): shape for i, shape in enumerate(view.ins) if shape is not None}
    shapes |= {Port(True, i): shape for i, shape in enumerate(view.outs)}
    queue: list[tuple[Port, Placement]] = []
    had: dict[Port, dict[Placement, None]] = {port: {} for port in shapes}
    for port, shape in shapes.items():
        queue += [(port, Shard(dim, c)) for dim, size in enumerate(shape) for c in cuts(size, view.ranks)]
        queue += [(port, Partial(reduction)) for reduction in ("sum", "max", "min")]
    seen, found = set(queue), {rule.replicate(view): None}
    per_dim = Counter((port, p.dim) for port, p in queue if isinstance(p, Shard))
    while queue:
        port, placement = queue.pop()
        had[port][placement] = None
        for strategy in op.strategies(view, port, placement, lambda other: list(had[other])):
            found[strategy] = None
            for other in shapes:
                after = strategy.at(other)
                if isinstance(after, Shard) and (other, after) not in seen:
                    per_dim[other, after.dim] += 1
                    if per_dim[other, after.dim] <= CUTS_PER_DIM:
                        seen.add((other, after))
                        queue.append((other, after))
    return sorted(found, key=lambda s: s.key)


def node_of(sample: Sample) -> ir.Node:
    """The sample as a node of a graph, in which constants are initialisers."""
    values = [None if t is None else _value(f"x{i}", t.dtype, t.shape) for i, t in enumerate(sample.ins)]
    outs = [_value(f"y{i}", t.dtype, t.shape) for i, t in enumerate(sample.outs)]
    node = ir.Node("", sample.op, values, convert_attributes(dict(sample.attrs)), outputs=outs)
    fixed = [v for v, t in zip(values, sample.ins) if v is not None and t is not None and t.constant]
    ir.Graph([v for v in values if v is not None and v not in fixed], outs, nodes=[node], initializers=fixed)
    return node


def _value(name: str, dtype: str, shape: Sequence[int]) -> ir.Value:
    dtype_ = ir_dtype(dtype)
    # onnx_ir wants numbers behind every initialiser; the checker never reads these.
    tensor = ir.LazyTensor(lambda: ir.tensor(np.zeros(shape, dtype)), dtype=dtype_, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype_), const_value=tensor)


def cases(sample: Sample) -> Iterator[Case]:
    """All strategies of a sample, on axes of all sizes."""
    node = node_of(sample)
    for ranks in RANKS:
        for strategy in strategies(view_of(node, ranks)):
            yield Case(sample, ranks, strategy)


# --- numbers --------------------------------------------------------------------------------------------------


def random(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Numbers for a tensor, as its kind says."""
    shape, dtype = tensor.shape, numpy_dtype(tensor.dtype)
    if tensor.kind == "p":
        return rng.uniform(0.1, 1, shape).astype(dtype)
    if tensor.kind == "z":
        return np.where(rng.random(shape) < 0.4, 0, rng.random(shape)).astype(dtype)
    if tensor.kind == "s":
        return rng.choice(np.array([0, 1, np.nan, np.inf, -np.inf], dtype), shape)
    if tensor.kind == "m":
        return np.where(rng.random(shape) < 0.4, 0, -np.inf).astype(dtype)
    if tensor.kind == "i":
        return rng.integers(-tensor.below, tensor.below, shape)
    if tensor.kind == "n":
        return np.arange(1, np.prod(shape, dtype=int) + 1).reshape(shape)
    if tensor.kind == "u":
        return rng.integers(0, 4, shape).astype(dtype)
    if tensor.kind in "qQwj":
        return (
            rng.integers(0, 256, shape)
            .astype(np.uint8)
            .astype(np.int8 if tensor.kind in "qw" else np.uint8)
            .astype(dtype)
        )
    if tensor.kind == "t":
        return np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2 == 0
    if tensor.kind == "b":
        return rng.random(shape) < 0.4
    return rng.standard_normal(shape).astype(dtype)


def scattered(
    tensor: Tensor, placement: Placement, ranks: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Random numbers and their pieces; those of a Partial are random summands."""
    if isinstance(placement, Partial) and not tensor.constant:
        pieces = [random(tensor, rng) for _ in range(ranks)]
        return join(pieces, placement, np), pieces
    whole = random(tensor, rng)
    return whole, [cut(whole, placement, ranks, rank, np) for rank in range(ranks)]


# --- the check ------------------------------------------------------------------------------------------------


def check(case: Case) -> str:
    """What is wrong with a case; empty where the rule is right."""
    try:
        with np.errstate(all="ignore"):
            return _compare(case)
    except Exception as error:
        return f"{case}\n    {type(error).__name__}: {error}"


def _compare(case: Case) -> str:
    _well_formed(case)
    rng = np.random.default_rng(crc32(str(case).encode()))
    given = [
        None if tensor is None else [scattered(tensor, placement, case.ranks, rng) for _ in range(case.sample.first)]
        for tensor, placement in zip(case.sample.ins, case.strategy.ins)
    ]
    for name, joined, whole in results(node_of(case.sample), case.strategy, case.ranks, given, case.sample.first):
        if not equal(joined, whole):
            return f"{case}\n    {name} differs: {_difference(joined, whole)}"
    return ""


Scattered = tuple[np.ndarray, list[np.ndarray]]
"""A tensor and its pieces, one a rank."""


def results(
    node: ir.Node, strategy: Strategy, ranks: int, given: Sequence[Sequence[Scattered] | None], first: int = 1
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, joined of the pieces that the ranks compute, computed whole) of every output.

    Args:
        given: the inputs, once for every coordinate of the first mesh axis, which has the size `first`.
    """
    mesh, alone = Mesh.of(cp=first, tp=ranks), Mesh.of(cp=first)
    local = Local(AXIS, ranks)
    wholes: dict[ir.Value, list[np.ndarray]] = {}
    pieces: dict[ir.Value, list[np.ndarray]] = {}
    for value, placement, each in zip(node.inputs, strategy.ins, given):
        if value is not None and each is not None and value not in wholes:
            shape = local_shape(each[0][0].shape, placement, ranks)
            piece = _value(f"{value.name}", dtype_of(value), shape)
            local.values[value, placement] = piece
            local.made[value] = placement
            wholes[value] = [whole for whole, _ in each]
            pieces[piece] = [part for _, parts in each for part in parts]
    partition.run_node(local, node, view_of(node, ranks), strategy)
    pieces |= {value: _constant(value, mesh) for value in local.initializers}
    want = lockstep.run([node], wholes, alone)
    got = lockstep.run(local.nodes, pieces, mesh)
    for value, placement in zip(node.outputs, strategy.outs):
        parts = got[local.values[value, placement]]
        for i, whole in enumerate(want[value]):
            yield value.name or "", join(parts[i * ranks : (i + 1) * ranks], placement, np), whole


def _well_formed(case: Case) -> None:
    """Whether every placement fits its tensor."""
    tensors = [*zip(case.sample.ins, case.strategy.ins), *zip(case.sample.outs, case.strategy.outs)]
    assert len(tensors) == len(case.strategy.ins) + len(case.strategy.outs), "a placement for every port"
    for tensor, placement in tensors:
        if isinstance(placement, Shard):
            assert tensor is not None, "an absent input has a placement"
            assert placement.size == tensor.shape[placement.dim], f"{placement} does not fill {tensor.shape}"
            assert placement.fits(case.ranks), f"{text(placement, case.ranks)} does not fit"


def _constant(value: ir.Value, mesh: Mesh) -> list[np.ndarray]:
    recipe = recipe_of(value)
    assert recipe is not None
    spec = value.meta["spec"]
    return [evaluate_shard(recipe, _no_weights, spec, mesh, mesh.coordinate(rank)) for rank in range(mesh.size)]


def _no_weights(name: str) -> Any:
    raise AssertionError(f"an expansion reads the weight {name}")


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.name not in TOLERANCE:
        return bool(np.array_equal(a, b))
    rtol, atol = TOLERANCE[a.dtype.name]
    return bool(np.allclose(a.astype(np.float32), b.astype(np.float32), rtol, atol, equal_nan=True))


def _difference(a: np.ndarray, b: np.ndarray) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{a.shape}, not {b.dtype}{b.shape}"
    error = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return f"by up to {np.nanmax(error, initial=0):.3g} in {np.mean(error > 1e-4):.0%} of its entries"


def kinds(case: Case) -> Iterator[str]:
    """What its placements are."""
    placed = case.strategy.ins + case.strategy.outs
    cuts = [p for p in placed if isinstance(p, Shard)]
    if any(len(p.segments) > 1 for p in cuts):
        yield "several segments"
    if any(s.copies == case.ranks for p in cuts for s in p.segments):
        yield "segments that every rank holds whole"
    if any(1 < s.copies < case.ranks for p in cuts for s in p.segments):
        yield "segments that some ranks share"
    if any(isinstance(p, Partial) for p in placed):
        yield "Partial results"
    if case.strategy.expand:
        yield "an expansion"


def summary(checked: Sequence[Case], wrong: int) -> str:
    """How much was proven, in words."""
    ops = {case.sample.op for case in checked}
    nodes = {str(case.sample) for case in checked}
    found = Counter(kind for case in checked for kind in kinds(case))
    having = ", ".join(f"{count:,} with {kind}" for kind, count in found.items())
    return f"{len(checked):,} cases of {len(nodes)} nodes of {len(ops)} ops, {wrong} wrong; {having}."


def main(arguments: Sequence[str]) -> int:
    """Check the samples of some ops, or of all; print what is wrong and how much was proven, or `--store` that."""
    ops = [argument for argument in arguments if argument != "--store"]
    checked = [case for sample in samples() if not ops or sample.op in ops for case in cases(sample)]
    wrong = [message for case in checked if (message := check(case))]
    print(*wrong, summary(checked, len(wrong)), sep="\n")
    if len(ops) < len(arguments) and not ops:
        put(DOCUMENT, summary(checked, len(wrong)), "proven")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
