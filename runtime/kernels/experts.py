"""Mixture of experts."""

from __future__ import annotations

import math
from typing import Any

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("Experts")
def experts(
    call: Call,
    x: Array,
    gates: Array,
    w1: Array,
    w2: Array,
    w3: Array | None = None,
    b1: Array | None = None,
    b3: Array | None = None,
) -> Array:
    """The sum over experts e of `gates[:, e] * (act(x w1[e]^T + b1[e]) * (x w3[e]^T + b3[e] + shift)) w2[e]^T`.

    x [t, d], gates [t, e], w1 and w3 [e, i, d], w2 [e, o, i], b1 and b3 [e, i] -> [t, o]; the second factor is there
    where w3 is. `activation` is relu, gelu, silu, identity or swish (`z * sigmoid(alpha z)`); with `limit` what is
    activated is at most that, and the second factor, before its shift, within plus and minus it.

    On the host an expert computes the tokens that it has a gate for. Elsewhere it computes all: to know them would mean
    to wait for the device.
    """
    xp = call.xp
    x, gates = wide(xp, x), wide(xp, gates)
    out = xp.zeros((x.shape[0], w2.shape[1]), x.dtype)
    for expert in range(gates.shape[1]):
        rows = xp.flatnonzero(gates[:, expert]) if xp.__name__ == "numpy" else slice(None)
        inner = _inner(call, x[rows], *(None if a is None else wide(xp, a[expert]) for a in (w1, w3, b1, b3)))
        out[rows] += gates[rows, expert, None] * xp.matmul(inner, wide(xp, w2[expert]).T)
    return rounded(call, out)


def _inner(call: Call, x: Array, w1: Array, w3: Array | None, b1: Array | None, b3: Array | None) -> Array:
    """The first layer of one expert, activated and gated."""
    xp, limit = call.xp, call.attrs.get("limit", math.inf)
    inner = _affine(xp, x, w1, b1)
    if w3 is None:
        return _activated(call, inner)
    other = _affine(xp, x, w3, b3)
    if limit != math.inf:
        inner, other = xp.minimum(inner, limit), xp.clip(other, -limit, limit)
    return _activated(call, inner) * (other + call.attrs.get("shift", 0.0))


def _affine(xp: Any, x: Array, w: Array, b: Array | None) -> Array:
    y = xp.matmul(x, w.T)
    return y if b is None else y + b


def _activated(call: Call, z: Array) -> Array:
    xp, name = call.xp, call.attrs["activation"]
    if name == "relu":
        return xp.maximum(z, 0)
    if name == "gelu":  # by tanh, as ONNX Runtime's experts have it
        return 0.5 * z * (1 + xp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if name == "identity":
        return z
    alpha = call.attrs.get("alpha", 1.0) if name == "swish" else 1.0
    return z / (1 + xp.exp(-alpha * z))
