"""Launchers of the ops that compute: expressions, norms, softmax, rotary embeddings, merges of attention."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence

from onnxmesh.runtime.cuda.codegen import compiling
from onnxmesh.runtime.cuda.codegen.elementwise import elementwise
from onnxmesh.runtime.cuda.codegen.expression import ROTARY, Program, program_of
from onnxmesh.runtime.cuda.codegen.formulas import FORMULAS
from onnxmesh.runtime.cuda.codegen.indexing import gather, gather_elements, trilu
from onnxmesh.runtime.cuda.codegen.operand import Operand, Source, Unsuited
from onnxmesh.runtime.cuda.codegen.reduction import REDUCTIONS, reduction
from onnxmesh.runtime.cuda.codegen.rows import CORES, rows
from onnxmesh.runtime.cuda.codegen.selection import cumulative, top_k
from onnxmesh.runtime.cuda.codegen.view import address
from onnxmesh.runtime.cuda.launchers import Job, Launch, launcher
from onnxmesh.runtime.kernels.fused import LITERAL, Step, steps

Generator = Callable[[Job, list[Operand | None], list[Operand]], Source]


def generated(*ops: str) -> Callable[[Generator], Generator]:
    """Register the launcher of ops whose kernel the decorated function makes; Unsuited declines."""

    def register(generator: Generator) -> Generator:
        @launcher(*ops)
        @functools.wraps(generator)
        def launch(job: Job) -> Launch | None:
            if not any(math.prod(out.shape) for out in job.outs):
                return lambda stream: None
            try:
                ins, outs = [None if x is None else Operand.of(x) for x in job.ins], [Operand.of(x) for x in job.outs]
                kernel = generator(job, ins, outs)
            except Unsuited:
                return None
            arrays = [job.ins[n] if n >= 0 else job.outs[-1 - n] for n in kernel.arguments]
            return compiling.enqueue(kernel, [address(x) for x in arrays])

        return generator

    return register


@generated(*FORMULAS, "CastLike", ROTARY)
def _one(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    return elementwise(program_of(job.kernel, job.attrs, ins), [(len(ins), outs[0])], job.kernel.lower())


@generated("Fused")
def _fused(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    program = Program(steps("Fused", json.dumps(job.attrs["expr"]), len(ins)), ins)
    return elementwise(program, [(len(program.dtypes) - 1, outs[0])])


@generated("FusedNorm")
def _fused_norm(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    program = Program(steps("FusedNorm", json.dumps(job.attrs["expr"]), len(ins)), ins)
    normalised = next(step.operands[0] for step in program.steps if step.op in CORES)
    assert normalised is not None
    return rows(program, list(zip((len(program.dtypes) - 1, normalised), outs)), "fused_norm")


@generated(*CORES)
def _norm(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    if len(outs) > 1:
        raise Unsuited("statistics of a norm")
    return rows(program_of(job.kernel, job.attrs, ins), [(len(ins), outs[0])], job.kernel.lower())


@generated("AttentionMerge")
def _merge(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    """See `attention_merge` in runtime/kernels/attention.py."""
    o1, m1, l1, o2, m2, l2 = range(6)
    line = _Lines(6)
    infinity = line("Literal", dtype="float32", value=-math.inf)
    zero, one = (line("Literal", dtype="float32", value=value) for value in (0.0, 1.0))
    highest = line("Max", m1, m2)
    reference = line("Where", line("Equal", highest, infinity), zero, highest)
    weight1, weight2 = (line("Mul", l, line("Exp", line("Sub", m, reference))) for l, m in ((l1, m1), (l2, m2)))
    total = line("Add", weight1, weight2)
    divisor = line("Where", line("Equal", total, zero), one, total)
    parts = [line("Mul", line("Cast", o, to="float32"), weight) for o, weight in ((o1, weight1), (o2, weight2))]
    merged = line("Div", line("Add", *parts), divisor)
    if any(x is None or x.dtype != "float32" for x in (ins[m1], ins[l1], ins[m2], ins[l2])):
        raise Unsuited("statistics that are not float32")
    return elementwise(Program(line.steps, ins), list(zip((merged, highest, total), outs)), "attention_merge")


@generated("AttentionFinish")
def _finish(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    """See `attention_finish` in runtime/kernels/attention.py."""
    o, total = ins
    assert o is not None and total is not None
    line = _Lines(2)
    zero = line("Literal", dtype=total.dtype.name, value=0.0)
    zeros = job.attrs.get("masked_row", "nan") == "zero"
    empty = line("Literal", dtype=o.dtype.name, value=0.0 if zeros else math.nan)
    result = line("Where", line("Equal", 1, zero), empty, 0)
    return elementwise(Program(line.steps, ins), [(result, outs[0])], "attention_finish")


class _Lines:
    """Steps written one after another; each call gives the number of the step's value."""

    def __init__(self, inputs: int) -> None:
        self.steps: list[Step] = []
        self._inputs = inputs

    def __call__(self, op: str, *operands: int, **attrs: object) -> int:
        assert op != LITERAL or not operands
        self.steps.append(Step(op, attrs, operands))
        return self._inputs + len(self.steps) - 1


@generated("Gather")
def _gather(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    data, indices = _given(ins)
    return gather(data, indices, outs[0], job.attrs.get("axis", 0))


@generated("GatherElements")
def _gather_elements(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    data, indices = _given(ins)
    return gather_elements(data, indices, outs[0], job.attrs.get("axis", 0))


@generated("Trilu")
def _trilu(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    return trilu(_given(ins)[0], outs[0], job.attrs.get("k", 0), bool(job.attrs.get("upper", 1)))


@generated(*REDUCTIONS)
def _reduce(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    x = _given(ins)[0]
    axes = job.attrs.get("axes")
    return reduction(job.kernel, x, outs[0], range(len(x.shape)) if axes is None else axes)


@generated("TopK")
def _top_k(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    (x,), (values, indices), attrs = _given(ins), outs, job.attrs
    largest = bool(attrs.get("largest", 1))
    axis, k = attrs.get("axis", -1), attrs["k"]
    return top_k(x, values, indices, axis, k, largest=largest, nan_first=largest, last=False)


@generated("ArgMax", "ArgMin")
def _arg(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    (x,), (out,), attrs = _given(ins), outs, job.attrs
    axis, last = attrs.get("axis", 0) % len(x.shape), bool(attrs.get("select_last_index", 0))
    if len(out.shape) < len(x.shape):
        out = out.viewed((*out.shape[:axis], 1, *out.shape[axis:]), (*out.strides[:axis], 0, *out.strides[axis:]))
    return top_k(x, None, out, axis, 1, largest=job.kernel == "ArgMax", nan_first=True, last=last)


@generated("CumSum")
def _cumulative(job: Job, ins: list[Operand | None], outs: list[Operand]) -> Source:
    attrs = job.attrs
    return cumulative(
        _given(ins)[0], outs[0], attrs["axis"], bool(attrs.get("exclusive", 0)), bool(attrs.get("reverse", 0))
    )


def _given(ins: Sequence[Operand | None]) -> list[Operand]:
    return [x for x in ins if x is not None]
