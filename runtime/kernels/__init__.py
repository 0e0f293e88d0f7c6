"""Kernels, written once over an array namespace `xp` (NumPy or CuPy).

Importing this package registers them all.
"""

from onnxmesh.runtime.kernels import (
    attention,
    caches,
    cast,
    conv,
    elementwise,
    fused,
    generate,
    indexing,
    integer,
    linear_attention,
    losses,
    matmul,
    norms,
    pool,
    quantise,
    random,
    recurrent,
    reduce,
    resize,
    signal,
    views,
)

__all__ = [
    "attention",
    "caches",
    "cast",
    "conv",
    "elementwise",
    "fused",
    "generate",
    "indexing",
    "integer",
    "linear_attention",
    "losses",
    "matmul",
    "norms",
    "pool",
    "quantise",
    "random",
    "recurrent",
    "reduce",
    "resize",
    "signal",
    "views",
]
