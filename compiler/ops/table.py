"""Every family of ops; importing this registers all rules."""

from onnxmesh.compiler.ops import (  # noqa: F401
    attention,
    caches,
    collectives,
    conv,
    elementwise,
    fused,
    generate,
    image,
    indexing,
    linear_attention,
    losses,
    matmul,
    norms,
    optimisers,
    pool,
    quantise,
    recurrent,
    reduce,
    signal,
    views,
)
