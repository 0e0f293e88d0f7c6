"""Kernels, written once over an array namespace `xp` (NumPy or CuPy).

Importing this package registers them all.
"""

from onnxmesh.runtime.kernels import (
    attention,
    elementwise,
    fused,
    indexing,
    matmul,
    norms,
    pool,
    reduce,
    views,
)

__all__ = ["attention", "elementwise", "fused", "indexing", "matmul", "norms", "pool", "reduce", "views"]
