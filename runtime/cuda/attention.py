"""Launchers of Attention and AttentionBlock: through cuDNN, or by a kernel of our own.

cuDNN attends without a mask, causally, or with a bias. What queries see is therefore taken apart first (visibility.py):
runs of queries that see no key are filled, runs that see the first keys are calls of cuDNN on just these, and what is
no such run becomes a bias: made once where it is constant, else by a kernel before each call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from onnxmesh.runtime.cuda import attention_direct, cudnn, raw
from onnxmesh.runtime.cuda.attention_mask_text import PRELUDE, Bias, Finish
from onnxmesh.runtime.cuda.codegen.operand import Operand, Unsuited
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.launchers import Job, Launch, chain, launcher
from onnxmesh.runtime.cuda.visibility import Run, runs, seen_by_mask, seen_by_position
from onnxmesh.runtime.kernels.registry import Array

_FEW_ROWS = 16
"""Up to so many rows of a head of k and v it is memory that counts, and our kernel splits the keys between blocks."""
_FEW_FLOPS = 2e7
_MOST_BIAS = 4 << 30
_MOST_LOOKED_AT = 1 << 26
"""Elements of a constant mask that are fetched to look for its form."""


@launcher("Attention", "AttentionBlock")
def attention(job: Job) -> Launch | None:
    """What launches the op; None where neither cuDNN nor our kernel takes it."""
    if math.prod(job.outs[0].shape) == 0:
        return lambda stream: None
    launch = _through_cudnn(job) if cudnn.available() and _is_large(job) else None
    return launch or attention_direct.prepare(job)


def _is_large(job: Job) -> bool:
    (_, h, s, d), (_, g, t, e) = _array(job, 0).shape, _array(job, 2).shape
    flops = 2.0 * _array(job, 0).shape[0] * h * s * t * (d + e)
    return h // g * s > _FEW_ROWS and flops > _FEW_FLOPS


def _array(job: Job, index: int) -> Array:
    array = job.ins[index]
    assert array is not None
    return array


# --- which way ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Way:
    """Runs of queries, and what of mask and positions goes into a bias. A bias of one row serves all queries."""

    runs: tuple[Run, ...]
    mask: bool = False
    positions: bool = False
    bias_rows: int = 1


def _ways(job: Job) -> Iterator[_Way]:
    """The ways to do it, the best first."""
    (s, t), mask = (_array(job, 0).shape[2], _array(job, 1).shape[2]), _given(job, 3)
    seen = _seen_in_all(job, s, t)
    found = None if seen is None else runs(seen)
    if found is not None:
        yield _Way(found)
    if mask is not None:
        seen = _seen_by_position(job, s, t)
        found = None if seen is None else runs(seen)
        if found is not None:
            for rows in sorted({mask.shape[2], s}):
                yield _Way(found, mask=True, bias_rows=rows)
    if mask is not None or _given(job, 5) is not None:
        yield _Way((Run(0, s, t),), mask is not None, _given(job, 5) is not None, s)


def _given(job: Job, index: int) -> Array | None:
    return job.ins[index] if index < len(job.ins) else None


def _constants(job: Job, *indices: int) -> list[np.ndarray] | None:
    """The values of inputs; None unless all are there and constant."""
    if all(_given(job, i) is not None and job.constant[i] for i in indices):
        return [import_cupy().asnumpy(_given(job, i)) for i in indices]
    return None


def _seen_by_position(job: Job, s: int, t: int) -> np.ndarray | None:
    """How many keys every query sees by its position: the first so many; None if that is not known, or not so."""
    if _given(job, 4) is None or _given(job, 5) is None:
        return np.full(s, t, np.int64)
    positions = _constants(job, 4, 5)
    return None if positions is None else seen_by_position(*positions)


def _seen_in_all(job: Job, s: int, t: int) -> np.ndarray | None:
    """The same where the mask counts too."""
    mask = _given(job, 3)
    if mask is None:
        return _seen_by_position(job, s, t)
    if not job.constant[3] or mask.shape[:2] != (1, 1) or s * t > _MOST_LOOKED_AT:
        return None
    visible = import_cupy().asnumpy(mask)[0, 0]
    if visible.dtype != bool:
        if visible.astype(np.float32).any():
            return None
        visible = np.ones_like(visible, bool)
    visible = np.broadcast_to(visible, (s, t))
    if _given(job, 5) is not None:
        positions = _constants(job, 4, 5)
        if positions is None:
            return None
        visible = visible & (positions[1][None, :] <= positions[0][:, None])
    return seen_by_mask(visible)


# --- through cuDNN ------------------------------------------------------------------------------------------


def _through_cudnn(job: Job) -> Launch | None:
    try:
        whole = _whole(job)
        if not cudnn.takes(whole.problem, whole.pointers):
            return None
        for way in _ways(job):
            launch = _launch(whole, way)
            if launch is not None:
                return launch
    except Unsuited:
        pass
    return None


@dataclass(frozen=True, slots=True)
class _Whole:
    """The attention over all queries and keys, without what hides keys."""

    job: Job
    problem: cudnn.Problem
    pointers: cudnn.Pointers
    operands: dict[str, Operand]


def _whole(job: Job) -> _Whole:
    arrays = dict(zip(("q", "k", "v", "mask", "q_pos", "k_pos"), job.ins)) | dict(zip("oml", job.outs))
    operands = {name: Operand.of(x) for name, x in arrays.items() if x is not None}
    if job.attrs.get("softcap") or job.attrs.get("qk_dtype"):
        raise Unsuited("scores that are changed")
    if any(operands[name].dtype != np.float32 for name in "ml" if name in operands):
        raise Unsuited("statistics that are not float32")
    if any(operands[name].dtype != np.int64 for name in ("q_pos", "k_pos") if name in operands):
        raise Unsuited("positions that are not int64")
    views = {name: _view(operands[name]) for name in "qkvo"}
    scale = job.attrs["scale"] if job.attrs.get("scale") is not None else 1 / math.sqrt(views["q"].shape[3])
    pointers = cudnn.Pointers(*(int(arrays[name].data.ptr) for name in "qkvo"))  # type: ignore[union-attr]
    problem = cudnn.Problem(views["q"], views["k"], views["v"], views["o"], float(scale))
    return _Whole(job, problem, pointers, operands)


def _view(operand: Operand) -> cudnn.View:
    b, h, s, d = operand.shape
    step_b, step_h, step_s, step_d = operand.strides
    return cudnn.View(operand.dtype.name, (b, h, s, d), (step_b, step_h, step_s, step_d if d > 1 else 1))


def _launch(whole: _Whole, way: _Way) -> Launch | None:
    """What launches it in this way; None if cuDNN has no plan for it."""
    job = whole.job
    bias = _bias(whole, way)
    if bias is not None and bias.nbytes > _MOST_BIAS:
        return None
    calls = [_call(whole, run, bias) if run.keys else None for run in way.runs]
    plans = [None if call is None else cudnn.plan(call[0]) for call in calls]
    if any(plan is None and run.keys for plan, run in zip(plans, way.runs)):
        return None
    scratch = _Scratch()
    before, place = _made(whole, bias, way, scratch) if bias is not None else ([], 0)
    b, h = job.outs[0].shape[:2]
    statistics = scratch.take(4 * b * h * max(run.rows for run in way.runs))
    own = scratch.take(max(plan.workspace if plan else 0 for plan in plans))
    job.workspace.reserve(scratch.nbytes)
    launches = list(before)
    for run, call, plan in zip(way.runs, calls, plans):
        if call is not None and plan is not None:
            launches.append(_execution(job, plan, call[1], place, statistics, own))
        if call is None or call[0].statistics:
            launches.append(_finish(whole, run, statistics, bias, place))
    return chain(launches)


class _Scratch:
    """Places in the workspace, one after the other."""

    def __init__(self) -> None:
        self.nbytes = 0

    def take(self, nbytes: int) -> int:
        """The offset of so many bytes."""
        place = self.nbytes
        self.nbytes += -(-nbytes // 256) * 256
        return place


def _call(whole: _Whole, run: Run, bias: Bias | None) -> tuple[cudnn.Problem, cudnn.Pointers]:
    """The problem of a run, and where its tensors are: that of a bias from the start of the bias."""
    problem, pointers, size = whole.problem, whole.pointers, 2  # bytes of the dtypes that cuDNN takes
    q, o = (replace(x, shape=(*x.shape[:2], run.rows, x.shape[3])) for x in (problem.q, problem.o))
    k, v = (replace(x, shape=(*x.shape[:2], run.keys, x.shape[3])) for x in (problem.k, problem.v))
    statistics = bias is not None or whole.job.kernel == "AttentionBlock"
    mine = replace(problem, q=q, k=k, v=v, o=o, causal=run.causal, statistics=statistics)
    place = 0
    if bias is not None:
        b, h, rows, _ = bias.shape
        step = bias.width if rows > 1 else 0
        shape = (b, h, run.rows, run.keys)
        mine = replace(mine, bias=cudnn.View(bias.dtype, shape, (h * rows * bias.width, rows * bias.width, step, 1)))
        place = run.start * step * (2 if bias.dtype == "bfloat16" else 4)
    starts = replace(
        pointers,
        q=pointers.q + run.start * problem.q.strides[2] * size,
        o=pointers.o + run.start * problem.o.strides[2] * size,
        bias=place,
    )
    return mine, starts


def _execution(
    job: Job, plan: cudnn.Plan, starts: cudnn.Pointers, bias: raw.Pointer, statistics: int, own: int
) -> Launch:
    workspace, offset = job.workspace, starts.bias

    def launch(stream: int) -> None:
        base = workspace.ptr
        there = raw.address(bias)
        pointers = replace(starts, bias=there + offset if there else 0, statistics=base + statistics)
        plan.launch(pointers, base + own, stream)

    return launch


def _finish(whole: _Whole, run: Run, statistics: int, bias: Bias | None, place: raw.Pointer) -> Launch:
    """Statistics, and the value of rows that see no key."""
    job = whole.job
    operands: dict[str, Operand] = {name: x for name, x in whole.operands.items() if name in ("v", "o", "m", "l")}
    masked_row = job.attrs.get("masked_row", "nan")
    source = Finish(operands, run, masked_row, bias).source()
    outs: list[raw.Pointer] = [out.data.ptr for out in job.outs]
    outs += [0] * (3 - len(outs))
    return raw.bind(source, PRELUDE, [0, 0, whole.pointers.v, place], [*outs, (job.workspace, statistics)])


# --- the bias -----------------------------------------------------------------------------------------------


def _bias(whole: _Whole, way: _Way) -> Bias | None:
    """The bias of a way: bfloat16 where that holds it exactly, else float32."""
    if not (way.mask or way.positions):
        return None
    operands, (b, h, _, _), t = whole.operands, whole.problem.q.shape, whole.problem.k.shape[2]
    mask = operands.get("mask") if way.mask else None
    exact = whole.problem.q.dtype == "bfloat16" and (mask is None or mask.dtype.name in ("bool", "bfloat16"))
    outer = (1, 1) if mask is None else mask.shape[:2]
    if mask is not None and any(n not in (1, size) for n, size in zip(outer, (b, h))):
        raise Unsuited("a mask that does not broadcast")
    shape, kind = (outer[0], outer[1], way.bias_rows, t), "bfloat16" if exact else "float32"
    q_pos, k_pos = (operands[name] if way.positions else None for name in ("q_pos", "k_pos"))
    return Bias(kind, shape, mask, q_pos, k_pos, uniform=whole.job.attrs.get("masked_row") == "uniform")


class _Made:
    """A bias in memory of its own, with the constants that it is made of: while it lives their addresses are theirs."""

    def __init__(self, bias: Bias, arrays: Sequence[Any]) -> None:
        cupy = import_cupy()
        self.arrays, self.memory = arrays, cupy.empty(bias.nbytes, "u1")
        ins = [0, 0, 0, *(0 if x is None else x.data.ptr for x in arrays)]
        raw.bind(bias.source(), PRELUDE, ins, [self.memory.data.ptr])(cupy.cuda.get_current_stream().ptr)


_MADE: WeakValueDictionary[Any, _Made] = WeakValueDictionary()


def _made(whole: _Whole, bias: Bias, way: _Way, scratch: _Scratch) -> tuple[list[Launch], raw.Pointer]:
    """What makes the bias before each call, nothing if it is constant; and where it is."""
    job, used = whole.job, ([3] if way.mask else []) + ([4, 5] if way.positions else [])
    arrays = [_given(job, i) if i in used else None for i in (3, 4, 5)]
    if all(job.constant[i] for i in used):
        addresses = tuple(None if x is None else int(x.data.ptr) for x in arrays)
        device = import_cupy().cuda.runtime.getDevice()
        key = (device, addresses, bias.source())
        made = _MADE.get(key) or _Made(bias, arrays)
        _MADE[key] = made
        return [_keep(made)], int(made.memory.data.ptr)
    place = (job.workspace, scratch.take(bias.nbytes))
    ins = [0, 0, 0, *(0 if x is None else int(x.data.ptr) for x in arrays)]
    return [raw.bind(bias.source(), PRELUDE, ins, [place])], place


def _keep(made: _Made) -> Launch:
    """Nothing, which keeps what was made."""

    def launch(stream: int, _keep: _Made = made) -> None:
        return None

    return launch
