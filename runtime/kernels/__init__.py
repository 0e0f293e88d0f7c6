"""Kernels, written once over an array namespace `xp` (NumPy or CuPy).

Importing this package registers them all.
"""

from onnxmesh.runtime.kernels import (
    attention,
    caches,
    conv,
    elementwise,
    fused,
    indexing,
    linear_attention,
    losses,
    matmul,
    norms,
    pool,
    quantise,
    recurrent,
    reduce,
    resize,
    views,
)

__all__ = [
    "attention",
    "caches",
    "conv",
    "elementwise",
    "fused",
    "indexing",
    "linear_attention",
    "losses",
    "matmul",
    "norms",
    "pool",
    "quantise",
    "recurrent",
    "reduce",
    "resize",
    "views",
]
