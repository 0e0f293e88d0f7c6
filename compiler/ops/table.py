"""Every family of ops; importing this registers all rules."""

from onnxmesh.compiler.ops import (  # noqa: F401
    attention,
    collectives,
    conv,
    elementwise,
    fused,
    indexing,
    losses,
    matmul,
    norms,
    pool,
    recurrent,
    reduce,
    views,
)
