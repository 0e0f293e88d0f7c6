"""Ops that make numbers from none: every rank makes all of them alike."""

from __future__ import annotations

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("Range")
def range_(call: Call, start: Array, delta: Array) -> Array:
    """start + i * delta, as many as the output has."""
    xp, first, step = call.xp, wide(call.xp, start), wide(call.xp, delta)
    return rounded(call, first + xp.arange(call.outs[0].shape[0]).astype(step.dtype) * step)


@kernel("EyeLike")
def eye_like(call: Call) -> Array:
    """1 on the diagonal `k` (above the main one where positive), 0 elsewhere."""
    xp, (rows, columns) = call.xp, call.outs[0].shape
    return rounded(call, xp.arange(rows)[:, None] + call.attrs.get("k", 0) == xp.arange(columns)[None, :])
