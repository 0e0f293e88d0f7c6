"""Linear algebra on the matrices in the last two dims."""

from __future__ import annotations

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("Inverse")
def inverse(call: Call, x: Array) -> Array:
    """The inverse of every matrix of x [..., n, n]."""
    return rounded(call, call.xp.linalg.inv(wide(call.xp, x)))
