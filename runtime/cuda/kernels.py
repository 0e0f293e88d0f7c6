"""Kernels that a GPU does in another way than the host."""

from __future__ import annotations

from onnxmesh.runtime.cuda import gemm
from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("MatMul", backend="cupy")
def matmul(call: Call, a: Array, b: Array) -> Array:
    """a [..., m, k] times b [..., k, n]. Half precision goes to cuBLASLt as it is: it sums in float32."""
    if gemm.takes(a, b):
        return rounded(call, gemm.matmul(call.xp, a, b))
    return rounded(call, call.xp.matmul(wide(call.xp, a), wide(call.xp, b)))
