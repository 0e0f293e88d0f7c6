"""Weights for a trial: small random numbers, for plans whose real weights are not at hand.

Number i of a shard is made from a hash of its seed and i (SplitMix64: Steele, Lea and Flood, Fast splittable
pseudorandom number generators, 2014), so any part can be made alone, and a GPU makes the same ones. The sum of the four
16-bit parts of a hash is nearly normal.
"""

from __future__ import annotations

import hashlib

import numpy as np

from onnxmesh.runtime.dtypes import is_narrow

RANDOM = "random"
"""In place of a folder of weights."""
DEVIATION = 0.02
"""Standard deviation of the floats. Integers and bools are zero, so that no lookup goes astray."""

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
CENTRE = 2 * 0xFFFF
SCALE = float(np.float32(DEVIATION / np.sqrt((2.0**32 - 1) / 3)))
"""Of a sum of four 16-bit parts, which has the variance 4 (2^32 - 1) / 12."""
_PART = 1 << 20


def seed(name: str, key: str) -> int:
    """The seed of a weight's shard: 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{name}\0{key}".encode()).digest()[:8], "little")


def is_drawn(kind: np.dtype) -> bool:
    """Whether values of this dtype are random, and not zero."""
    return kind.kind == "f" or is_narrow(kind)


def random_shard(name: str, key: str, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a weight's shard."""
    array = np.zeros(shape, kind)
    if is_drawn(kind):
        flat, first = array.reshape(-1), seed(name, key)
        for start in range(0, flat.size, _PART):
            part = flat[start : start + _PART]
            part[...] = _normal(first, start, part.size).astype(kind)
    return array


def _normal(first: int, start: int, count: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = np.uint64(first) + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
        z ^= z >> np.uint64(31)
    total = sum((z >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    return (np.asarray(total).astype(np.int64) - CENTRE).astype(np.float32) * np.float32(SCALE)
