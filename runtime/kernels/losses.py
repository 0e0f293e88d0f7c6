"""Losses of a classifier."""

from __future__ import annotations

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("NegativeLogLikelihoodLoss")
def negative_log_likelihood(
    call: Call, x: Array, target: Array, weight: Array | None = None
) -> Array | tuple[Array, Array]:
    """-weight[class] * x[class] of the target's class, 0 where that is `ignore_index`.

    x [n, c, ...] log-probabilities, target [n, ...] classes, weight [c] -> [n, ...]; with `reduction` sum two scalars:
    the sum of these, and the sum of the weights that count, by which a mean divides.
    """
    xp, ignored = call.xp, call.attrs.get("ignore_index")
    counts = xp.ones(target.shape, bool) if ignored is None else target != ignored
    classes = xp.where(counts, target, 0)
    picked = xp.take_along_axis(wide(xp, x), classes[:, None], axis=1)[:, 0]
    weights = xp.where(counts, 1 if weight is None else wide(xp, weight)[classes], 0).astype(picked.dtype, copy=False)
    losses = xp.where(counts, -picked * weights, 0)
    if call.attrs.get("reduction") == "none":
        return rounded(call, losses)
    return rounded(call, losses.sum()), rounded(call, weights.sum(), 1)
