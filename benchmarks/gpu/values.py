"""Values of parameters that depend on nothing but their names, so that every program makes the same ones."""

from __future__ import annotations

import zlib

import ml_dtypes
import numpy as np

INSIDE = 1 << 16
"""Bytes up to which a parameter is stored in the exported file: the compiler folds constants up to that size."""


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter `name` in bf16: products keep the size of their input, and norms scale by about one."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.random(shape, np.float32)
    x -= np.float32(0.5)
    norm = len(shape) == 1 and name.endswith("weight")
    x *= np.float32(0.2 if len(shape) == 1 else 3.0 * shape[-1] ** -0.5)
    if norm:
        x += np.float32(1.0)
    return x.astype(ml_dtypes.bfloat16)
