"""Rounding told apart from errors: how far from the exact result a right one may be.

With r the reference's result (the model's own nodes in its own dtypes), y the same in float64 and x ours, all of the
same inputs, an element of ours is wrong where

    |x - y| > FACTOR * E + LAMBDA * sqrt(n) * u * s + LAMBDA * sqrt(m) * v * s + D

- E: the largest |r - y| of the element's row: what the reference itself is off. Ours may sum in another order, and add
  the shares of ranks, so it may be FACTOR times as far.
- n: terms that are added on the way, over all nodes of the segment; u = 2^-24, float32's unit roundoff. The error of a
  sum of n terms grows as sqrt(n) u, whatever the order, but for a chance that falls as exp(-LAMBDA^2 / 2) (Higham and
  Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019).
- m: nodes of the segment; v: unit roundoff of the narrowest float that either side keeps values in (2^-8 of bfloat16,
  2^-11 of float16, 2^-24 of float32), to which each of them may round once.
- s: the size of the element: |y|, or the root mean square of its row if that is more.
- D: the largest change in the element's row of y when every float input and weight is changed at random by up to
  LAMBDA * (sqrt(n) * u + sqrt(m) * v) of itself, over a few changes. It is the condition of the problem: what a
  backward stable computation may be off (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, 1.5).

A row is along the last dim, or the whole tensor where that has less than SHORT elements. Where |x - r| is within the
two terms of n and m, of |r| in place of |y|, the condition holds whatever y is, so y need not be computed.

Integers and booleans must be the reference's, or float64's; those that an op rounds to may be one step off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from onnxmesh.runtime.dtypes import is_narrow

FACTOR, LAMBDA = 4.0, 8.0
SHORT = 32
CHUNK = 1 << 18
"""Elements that are compared at a time: the comparison's own memory is a few arrays of so many float64."""

UNIT = 2.0**-24
"""Unit roundoff of float32."""


@dataclass(frozen=True)
class Bound:
    """n and m of a segment, v of its dtypes, and how many steps its integers may be off."""

    terms: int
    nodes: int
    unit: float
    steps: int = 0

    @property
    def relative(self) -> float:
        """The two terms that go with an element's size."""
        return LAMBDA * (UNIT * float(np.sqrt(self.terms)) + self.unit * float(np.sqrt(self.nodes)))


def is_float(dtype: np.dtype) -> bool:
    """Whether it is a floating point or complex dtype."""
    return dtype.kind in "fc" or is_narrow(dtype)


def unit_roundoff(dtype: np.dtype) -> float:
    """Of a float dtype; float64's counts as float32's, as what is not a float does."""
    if not is_narrow(dtype):
        return UNIT
    return float(ml_dtypes.finfo(dtype).eps) / 2


@dataclass(frozen=True)
class Spread:
    """What float64 says of a tensor: its result y, and by row E and D."""

    exact: np.ndarray
    slack: np.ndarray

    @staticmethod
    def of(exact: np.ndarray, reference: np.ndarray, changed: Iterator[np.ndarray]) -> Spread:
        """From float64's result, the reference's, and float64's for changed inputs."""
        slack = FACTOR * _largest_difference(reference, exact)
        worst = np.zeros_like(slack)
        for other in changed:
            worst = np.maximum(worst, _largest_difference(other, exact))
        return Spread(exact, np.broadcast_to(slack + worst, exact.shape))


def scale(reference: np.ndarray) -> np.ndarray:
    """The root mean square of each row, as a view of the tensor's shape."""
    if not _has_rows(reference):
        total = sum(float(np.square(_finite(part)).sum()) for part in chunks(reference))
        return np.broadcast_to(np.sqrt(total / max(1, reference.size)), reference.shape)
    rows = _by_row(lambda part: np.sqrt(np.square(_finite(part)).mean(axis=-1)), reference)
    return np.broadcast_to(rows, reference.shape)


def _largest_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The largest difference of each row, or of all."""
    if not _has_rows(b):
        return np.asarray(
            max((float(_difference(x, y).max(initial=0)) for x, y in zip(chunks(a), chunks(b))), default=0)
        )
    return _by_row(lambda x, y: _difference(x, y).max(axis=-1), a, b)


def _by_row(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """What a function gives for each row, [..., 1], some rows at a time."""
    shape = arrays[0].shape
    flat = [array.reshape(-1, shape[-1]) for array in arrays]
    step = max(1, CHUNK // shape[-1])
    parts = [function(*(x[start : start + step] for x in flat)) for start in range(0, len(flat[0]), step)]
    return np.concatenate([np.empty(0), *parts]).reshape(*shape[:-1], 1)


@dataclass(frozen=True)
class Judgement:
    """Of a piece of a tensor: how many elements are wrong, the first of them, and the worst share of the allowed."""

    wrong: int
    first: int
    worst: float
    largest: float


def judge(
    ours: np.ndarray, reference: np.ndarray, size: np.ndarray, bound: Bound, spread: Spread | None = None
) -> Judgement:
    """Compare a piece with the same piece of the reference; `size` is that of `scale`.

    With a spread the full condition holds; without one that which needs no float64.
    """
    wrong, first, worst, largest, done = 0, -1, 0.0, 0.0, 0
    exact = spread.exact if spread is not None else reference
    slack = spread.slack if spread is not None else np.broadcast_to(np.zeros(()), reference.shape)
    for x, r, y, s, extra in zip(*map(chunks, (ours, reference, exact, size, slack))):
        ratio, off = _ratios(x, r, y, s, extra, bound)
        bad = np.flatnonzero(ratio > 1)
        if bad.size and first < 0:
            first = done + int(bad[0])
        wrong += int(bad.size)
        worst, largest = max(worst, float(ratio.max(initial=0))), max(largest, float(off.max(initial=0)))
        done += x.size
    return Judgement(wrong, first, worst, largest)


def allowed(exact: float, size: float, slack: float, bound: Bound) -> float:
    """What an element may be off."""
    return bound.relative * max(abs(exact), size) + slack


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array's elements in row-major order, some at a time, without a copy of all of them."""
    if array.size <= CHUNK:
        yield array.reshape(-1)
    elif array.ndim > 1 and array.shape[0] > 1 and array[0].size <= CHUNK:
        step = max(1, CHUNK // max(1, array[0].size))
        for start in range(0, array.shape[0], step):
            yield array[start : start + step].reshape(-1)
    elif array.ndim > 1:
        for part in array:
            yield from chunks(part)
    else:
        for start in range(0, array.size, CHUNK):
            yield array[start : start + CHUNK]


def _ratios(
    x: np.ndarray, r: np.ndarray, y: np.ndarray, s: np.ndarray, extra: np.ndarray, bound: Bound
) -> tuple[np.ndarray, np.ndarray]:
    """|x - y| of what is allowed, and |x - y|. Numbers that are not finite must be the reference's, or float64's."""
    if not is_float(x.dtype):
        off = np.minimum(*(np.abs(x.astype(np.float64) - other.astype(np.float64)) for other in (r, y)))
        return np.where(off > bound.steps, np.inf, 0.0), off
    x, r, y = (part.astype(np.complex128 if part.dtype.kind == "c" else np.float64) for part in (x, r, y))
    with np.errstate(all="ignore"):
        off = np.abs(x - y)
        ratio = off / (bound.relative * np.maximum(np.abs(y), s) + extra)
    same = (x == y) | (x == r) | (np.isnan(x) & (np.isnan(r) | np.isnan(y)))
    ratio = np.where(same, 0.0, np.where(np.isnan(ratio), np.inf, ratio))
    return ratio, np.where(same & ~np.isfinite(off), 0.0, np.nan_to_num(off, nan=np.inf))


def _has_rows(array: np.ndarray) -> bool:
    return array.ndim > 0 and array.shape[-1] >= SHORT


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.nan_to_num(np.abs(a - b), nan=0.0, posinf=0.0)


def _finite(array: np.ndarray) -> np.ndarray:
    wide = np.abs(array) if array.dtype.kind == "c" else array.astype(np.float64)
    return np.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0)
