"""Transforms of signals, windows and mel filters. Complex numbers are a last dim of 2, real ones a last dim of 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel
from onnxmesh.runtime.kernels.windows import windows


@kernel("DFT")
def dft(call: Call, x: Array) -> Array:
    """The discrete Fourier transform along `axis`, of the first `length` entries, or filled up with zeros.

    x is [..., n, ..., 1 or 2]. With `onesided` the forward transform of real x gives the first length // 2 + 1
    frequencies, and the `inverse` one makes `length` real numbers of these. The inverse is divided by `length`.
    """
    xp, axis, n = call.xp, call.attrs["axis"], call.attrs["length"]
    numbers = _numbers(xp, wide(xp, x))
    if not call.attrs.get("inverse", 0):
        return rounded(call, _parts(xp, _spectrum(xp, numbers, n, axis, call.attrs.get("onesided", 0))))
    if call.attrs.get("onesided", 0):
        return rounded(call, xp.fft.irfft(numbers, n, axis=axis)[..., None])
    return rounded(call, _parts(xp, xp.fft.ifft(numbers, n, axis=axis)))


@kernel("STFT")
def stft(call: Call, signal: Array, window: Array | None = None) -> Array:
    """The Fourier transforms of frames of `frame_length` entries, one every `frame_step`.

    signal is [batch, n, 1 or 2], window [frame_length]; the result is [batch, frames, frequencies, 2]. `onesided`
    (the default) leaves out the frequencies above half, which real numbers repeat.
    """
    xp, length = call.xp, call.attrs["frame_length"]
    numbers = _numbers(xp, wide(xp, signal))
    frames = windows(xp, numbers[:, None], [length], [call.attrs["frame_step"]], [1], call.outs[0].shape[1:2])
    frames = frames[:, 0].swapaxes(1, 2)
    frames = frames if window is None else frames * wide(xp, window)
    return rounded(call, _parts(xp, _spectrum(xp, frames, length, -1, call.attrs.get("onesided", 1))))


def _spectrum(xp: Any, numbers: Array, n: int, axis: int, onesided: int) -> Array:
    return (xp.fft.rfft if onesided else xp.fft.fft)(numbers, n, axis=axis)


def _numbers(xp: Any, x: Array) -> Array:
    """[..., 1] as real numbers [...], [..., 2] as complex ones."""
    return x[..., 0] if x.shape[-1] == 1 else x[..., 0] + 1j * x[..., 1]


def _parts(xp: Any, numbers: Array) -> Array:
    return xp.stack([numbers.real, numbers.imag], axis=-1)


_COSINES: dict[str, Sequence[float]] = {
    "HannWindow": (0.5, -0.5),
    "HammingWindow": (25 / 46, -21 / 46),
    "BlackmanWindow": (0.42, -0.5, 0.08),
}
"""The window is the sum of these, each times the cosine of so many turns."""


def _register(op: str, factors: Sequence[float]) -> None:
    @kernel(op)
    def window(call: Call) -> Array:
        """A sum of cosines over the output's n entries: one turn is n of them, or n - 1 where `periodic` is 0."""
        xp, n = call.xp, call.outs[0].shape[0]
        turn = n if call.attrs.get("periodic", 1) else n - 1
        angle = 2 * math.pi / max(turn, 1) * xp.arange(n)
        return rounded(call, sum(factor * xp.cos(i * angle) for i, factor in enumerate(factors)))


for _op, _factors in _COSINES.items():
    _register(_op, _factors)


@kernel("MelWeightMatrix")
def mel_weight_matrix(call: Call, bands: Array, length: Array, rate: Array, low: Array, high: Array) -> Array:
    """Triangles over the frequencies of a one-sided transform: [length // 2 + 1, bands].

    Their feet are `bands` + 2 points between `low` and `high` (Hz), at equal steps of mel(f) = 2595 log10(1 + f / 700)
    (O'Shaughnessy 1987) of which, as in ONNX Runtime, there is one more than there are points; each is moved down to a
    frequency of the transform.
    """
    xp = call.xp
    rows, columns = call.outs[0].shape
    first, last = (2595 * xp.log10(1 + hertz.reshape(()).astype(xp.float64) / 700) for hertz in (low, high))
    mel = first + xp.arange(columns + 2) * (last - first) / (columns + 2)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    feet = xp.floor((length.reshape(()) + 1) * hertz / rate.reshape(())).astype(xp.int64)
    left, top, right = feet[:-2], feet[1:-1], feet[2:]
    at = xp.arange(rows)[:, None]
    rising = xp.where(at >= left, (at - left) / xp.maximum(top - left, 1), 0)
    falling = xp.where(at < right, (right - at) / xp.maximum(right - top, 1), 0)
    return rounded(call, xp.where(at < top, rising, xp.where(at > top, falling, 1)))
