"""One step of an optimiser, on one tensor. The rate is a scalar, and so is the number of steps that were made."""

from __future__ import annotations

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("Adagrad")
def adagrad(call: Call, rate: Array, count: Array, x: Array, gradient: Array, squares: Array) -> tuple[Array, Array]:
    """The tensor and the sum of its squared gradients (Duchi et al., 2011)."""
    xp, attrs = call.xp, call.attrs
    x, gradient = wide(xp, x), _regularised(call, x, gradient)
    factor = (rate / (1 + count * attrs.get("decay_factor", 0.0))).astype(x.dtype)
    total = wide(xp, squares) + gradient * gradient
    new = x - factor * gradient / (xp.sqrt(total) + attrs.get("epsilon", 1e-6))
    return rounded(call, new), rounded(call, total, 1)


@kernel("Adam")
def adam(
    call: Call, rate: Array, count: Array, x: Array, gradient: Array, mean: Array, squares: Array
) -> tuple[Array, Array, Array]:
    """The tensor, and the running means of its gradients and of their squares (Kingma and Ba, 2015)."""
    xp, attrs = call.xp, call.attrs
    alpha, beta = attrs.get("alpha", 0.9), attrs.get("beta", 0.999)
    x, gradient = wide(xp, x), _regularised(call, x, gradient)
    mean = alpha * wide(xp, mean) + (1 - alpha) * gradient
    squares = beta * wide(xp, squares) + (1 - beta) * gradient * gradient
    steps = xp.maximum(count, 1)
    corrected = rate * xp.sqrt(1 - beta**steps) / (1 - alpha**steps)
    factor = xp.where(count > 0, corrected, rate).astype(x.dtype)
    new = x - factor * mean / (xp.sqrt(squares) + attrs.get("epsilon", 1e-6))
    new = (1 - attrs.get("norm_coefficient_post", 0.0)) * new
    return rounded(call, new), rounded(call, mean, 1), rounded(call, squares, 2)


@kernel("Momentum")
def momentum(call: Call, rate: Array, count: Array, x: Array, gradient: Array, speed: Array) -> tuple[Array, Array]:
    """The tensor and its momentum, standard or with `mode` nesterov (Sutskever et al., 2013)."""
    xp, attrs = call.xp, call.attrs
    x, gradient = wide(xp, x), _regularised(call, x, gradient)
    beta = xp.where(count > 0, attrs["beta"], 1.0).astype(x.dtype)
    speed = attrs["alpha"] * wide(xp, speed) + beta * gradient
    step = gradient + attrs["alpha"] * speed if attrs["mode"] == "nesterov" else speed
    return rounded(call, x - rate.astype(x.dtype) * step), rounded(call, speed, 1)


def _regularised(call: Call, x: Array, gradient: Array) -> Array:
    """The gradient, with that of norm_coefficient / 2 * |x|^2."""
    return call.attrs.get("norm_coefficient", 0.0) * wide(call.xp, x) + wide(call.xp, gradient)
