"""Linear attention: each head has a state of its own, and so has each feature of the values."""

from __future__ import annotations

from math import prod

from onnxmesh.compiler.ir.rule import Factors, OpView, register

LABELS = ("bgr..", "bg..", "bg.e", "bg.e", "bg..", "bg..")
"""Of q, k, v, past, decay, beta: batch, heads of k, heads of q for each, features of v; a dot is whole."""


def linear_attention(view: OpView) -> Factors:
    """Batch, heads, heads of q within one of k (whose state every rank then computes), features of the values."""

    def labels(shape: tuple[int, ...] | None, names: str) -> tuple[str | None, ...]:
        return tuple(name if size > 1 and name != "." else None for name, size in zip(names, shape or ()))

    ins = tuple(labels(shape, names) for shape, names in zip(view.ins, LABELS))
    return Factors(ins, tuple(labels(shape, names) for shape, names in zip(view.outs, ("bgr.e", "bg.e"))))


def flops(view: OpView) -> float:
    """Of every token: what its key adds to the state, and what each head of q reads of it."""
    q, v = view.ins[0], view.ins[2]
    assert q is not None and v is not None
    return 2.0 * prod(v[:3]) * q[4] * v[3] * (q[2] + 1)


_QKV = "f[2,6,3,5,4], f[2,6,5,4], f[2,6,5,8]"

register(
    "LinearAttention",
    factors=linear_attention,
    flops=flops,
    samples=(
        (f"{_QKV} -> f[2,6,3,5,8], f[2,6,4,8]", {"scale": 0.5}),
        (f"{_QKV}, f[2,6,4,8], f[2,6,5,4] -> f[2,6,3,5,8], f[2,6,4,8]", {"scale": 0.5}),
        (f"{_QKV}, -, f[2,6,5,1], p[2,1,5,1] -> f[2,6,3,5,8], f[2,6,4,8]", {"scale": 1.0}),
        ("h[4,13,1,2,4], h[4,13,2,4], h[4,13,2,6] -> h[4,13,1,2,6], h[4,13,4,6]", {"scale": 0.5}),
    ),
)
