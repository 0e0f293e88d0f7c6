"""Transforms of signals: along the signal all of it is needed; batches are free."""

from __future__ import annotations

from math import log2, prod

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, numbered, register


def dft(view: OpView) -> Factors:
    """All dims but the signal's and that of the complex numbers. A transform is linear."""
    shape = view.ins[0]
    assert shape is not None
    axis = int(view.attr("axis")) % len(shape)
    labels: Labels = tuple(None if i in (axis, len(shape) - 1) else label for i, label in enumerate(numbered(shape)))
    return Factors((labels,), (labels,), linear=(frozenset({0}),))


def stft(view: OpView) -> Factors:
    """The batch. Linear in the signal, and in the window."""
    shape = view.ins[0]
    assert shape is not None
    batch = numbered(shape)[:1]
    ins: tuple[Labels, ...] = ((*batch, None, None), *((None,) for _ in view.ins[1:]))
    linear = tuple(frozenset({i}) for i in range(len(view.ins)))
    return Factors(ins, ((*batch, None, None, None),), linear=linear)


def dft_flops(view: OpView) -> float:
    """5 n log2 n a transform, as FFTs are counted (Cooley and Tukey)."""
    n = int(view.attr("length"))
    shape = view.ins[0]
    assert shape is not None
    return 5.0 * prod(shape[:-1]) / max(shape[int(view.attr("axis"))], 1) * n * log2(max(n, 2))


def stft_flops(view: OpView) -> float:
    """5 n log2 n a frame."""
    n = int(view.attr("frame_length"))
    return 5.0 * prod(view.outs[0][:2]) * n * log2(max(n, 2))


register("DFT", factors=dft, flops=dft_flops)
register("STFT", factors=stft, flops=stft_flops)
