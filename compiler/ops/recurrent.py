"""Recurrent layers: sequences of a batch are independent; steps and features of one are not."""

from __future__ import annotations

from math import prod

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Shape, register

X, W, R, BIAS, LENGTHS, INITIAL_H, INITIAL_C, PEEPHOLES = range(8)


def batch(view: OpView) -> Factors:
    """RNN, GRU, LSTM: the batch stands second in x, or first with `layout` 1, and beside the features in states."""
    first = view.attr("layout", 0) == 1
    n = "n" if (view.ins[X] or (0, 0))[0 if first else 1] > 1 else None

    def labels(shape: Shape | None, at: int) -> Labels:
        return tuple(n if i == at else None for i in range(len(shape or ())))

    at = {X: 0 if first else 1, LENGTHS: 0, INITIAL_H: 0 if first else 1, INITIAL_C: 0 if first else 1}
    ins = tuple(labels(shape, at.get(i, -1)) for i, shape in enumerate(view.ins))
    outs = tuple(labels(shape, 0 if first else len(shape) - 2) for shape in view.outs)
    return Factors(ins, outs)


def flops(view: OpView) -> float:
    """2 for every weight, step and sequence."""
    x, w, r = view.ins[X], view.ins[W], view.ins[R]
    assert x is not None and w is not None and r is not None
    return 2.0 * x[0] * x[1] * (prod(w) + prod(r))


_RNN = "f[3,12,5], f[1,4,5]!, f[1,4,4]!"
_LSTM = "f[2,6,4], f[2,12,4]!, f[2,12,3]!, f[2,24]!"
_GRU = "f[3,13,2], f[1,9,2]!, f[1,9,3]!, f[1,18]"

register(
    "RNN",
    factors=batch,
    flops=flops,
    samples=((f"{_RNN} -> f[3,1,12,4], f[1,12,4]", {"hidden_size": 4, "direction": "reverse"}),),
)
register(
    "GRU",
    factors=batch,
    flops=flops,
    samples=(
        (f"{_GRU}, -, f[1,13,3] -> f[3,1,13,3], f[1,13,3]", {"hidden_size": 3, "linear_before_reset": 1}),
        (f"{_GRU} -> f[3,1,13,3]", {"hidden_size": 3, "clip": 0.5}),
    ),
)
register(
    "LSTM",
    factors=batch,
    flops=flops,
    samples=((f"{_LSTM} -> f[2,2,6,3], f[2,6,3], f[2,6,3]", {"hidden_size": 3, "direction": "bidirectional"}),),
)
