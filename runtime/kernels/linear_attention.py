"""Attention without a softmax, which carries a state from token to token instead of a cache of keys."""

from __future__ import annotations

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("LinearAttention")
def linear_attention(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    past: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
) -> tuple[Array, Array]:
    """o_t = scale q_t S_t, where S_t = D + k_t (x) v_t and D = exp(decay_t) S; beta makes v_t beta_t (v_t - k_t D).

    q [b, g, r, t, d] (r heads of q for one of k), k [b, g, t, d], v [b, g, t, e], past [b, g, d, e] (zeros where
    absent), decay [b, g, t, d or 1] in log space, beta [b, g or 1, t, 1] -> o [b, g, r, t, e], the last S [b, g, d, e].
    Plain: Katharopoulos et al., 2020; with decay: Yang et al., 2024 (GLA); with beta the delta rule, both: Yang et al.,
    2025 (Gated DeltaNet).
    """
    xp = call.xp
    q, k, v = wide(xp, q), wide(xp, k), wide(xp, v)
    batch, heads, steps, size = k.shape
    state = xp.zeros((batch, heads, size, v.shape[3]), k.dtype) if past is None else wide(xp, past)
    kept = None if decay is None else xp.exp(wide(xp, decay))
    rates = None if beta is None else wide(xp, beta)
    out = xp.empty(call.outs[0].shape, q.dtype)
    for t in range(steps):
        if kept is not None:
            state = state * kept[:, :, t, :, None]
        new = v[:, :, t]
        if rates is not None:
            new = rates[:, :, t] * (new - xp.matmul(k[:, :, t, None], state)[:, :, 0])
        state = state + k[:, :, t, :, None] * new[:, :, None]
        out[:, :, :, t] = xp.matmul(q[:, :, :, t], state)
    out *= call.attrs["scale"]
    return rounded(call, out), rounded(call, state, 1)
