"""Random numbers, the same on every rank and in every run.

A draw is a function of its node's `seed` alone: NumPy's RandomState, whose stream NumPy has frozen and ONNX's
reference evaluator uses. A node without a seed is given one of its own when it is compiled. On a GPU the numbers are
drawn by the host and copied.
"""

from __future__ import annotations

import numpy as np

from onnxmesh.runtime.kernels.numeric import rounded
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("RandomUniform")
def random_uniform(call: Call) -> Array:
    """Numbers from `low` (default 0) to `high` (default 1), all as likely."""
    low, high = call.attrs.get("low", 0.0), call.attrs.get("high", 1.0)
    return _placed(call, _state(call).random_sample(call.outs[0].shape) * (high - low) + low)


@kernel("RandomNormal")
def random_normal(call: Call) -> Array:
    """Numbers of the normal distribution with `mean` (default 0) and the standard deviation `scale` (default 1)."""
    numbers = _state(call).standard_normal(call.outs[0].shape)
    return _placed(call, numbers * call.attrs.get("scale", 1.0) + call.attrs.get("mean", 0.0))


@kernel("Multinomial")
def multinomial(call: Call, logits: Array, uniform: Array) -> Array:
    """Classes drawn by the inverse of their distribution function.

    Args:
        logits: [batch, classes], unnormalised log-probabilities.
        uniform: [batch, samples], numbers in [0, 1).

    Returns:
        [batch, samples], class numbers. All rows are looked up at once: row i holds its distribution plus i.
    """
    xp = call.xp
    x = logits.astype(xp.float64)
    rows, classes = x.shape
    sums = xp.cumsum(xp.exp(x - x.max(axis=1, keepdims=True)), axis=1)
    offset = xp.arange(rows)[:, None]
    table, wanted = sums / sums[:, -1:] + offset, uniform.astype(xp.float64) + offset
    found = xp.searchsorted(table.reshape(-1), wanted.reshape(-1), side="right").reshape(wanted.shape)
    return rounded(call, xp.clip(found - offset * classes, 0, classes - 1))


def _state(call: Call) -> np.random.RandomState:
    return np.random.RandomState(int(call.attrs["seed"]) % 2**32)


def _placed(call: Call, numbers: np.ndarray) -> Array:
    """The host's numbers in the output's dtype, where the arrays of this call are."""
    return call.xp.asarray(numbers.astype(call.outs[0].dtype))
