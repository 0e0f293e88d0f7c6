"""Optimisers: every element is updated by itself."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, OpView, numbered, register


def update(view: OpView) -> Factors:
    """Rate and count, scalars; then tensors of one shape."""
    labels = numbered(view.outs[0])
    scalars = tuple((None,) * len(shape or ()) for shape in view.ins[:2])
    return Factors((*scalars, *(labels for _ in view.ins[2:])), tuple(labels for _ in view.outs))


_STATE = "p[], n[], f[6,12], f[6,12]"

register(
    "Adagrad",
    factors=update,
    samples=((f"{_STATE}, p[6,12] -> f[6,12], f[6,12]", {"decay_factor": 0.1, "norm_coefficient": 0.01}),),
)
register("Adam", factors=update, samples=((f"{_STATE}, f[6,12], p[6,12] -> f[6,12], f[6,12], f[6,12]", {}),))
register(
    "Momentum",
    factors=update,
    samples=((f"{_STATE}, f[6,12] -> f[6,12], f[6,12]", {"mode": "nesterov", "alpha": 0.9, "beta": 0.8}),),
)
