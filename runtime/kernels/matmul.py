"""Contractions: MatMul and Einsum."""

from __future__ import annotations

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("MatMul")
def matmul(call: Call, a: Array, b: Array) -> Array:
    """a [..., m, k] times b [..., k, n], as numpy.matmul."""
    return rounded(call, call.xp.matmul(wide(call.xp, a), wide(call.xp, b)))


@kernel("Einsum")
def einsum(call: Call, *inputs: Array) -> Array:
    """The sum of products that `equation` says."""
    operands = (wide(call.xp, x) for x in inputs)
    return rounded(call, call.xp.einsum(call.attrs["equation"], *operands, optimize=True))


@kernel("Det")
def det(call: Call, x: Array) -> Array:
    """The determinants of the matrices [..., n, n]."""
    return rounded(call, call.xp.linalg.det(wide(call.xp, x)))
