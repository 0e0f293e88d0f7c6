"""What a generator knows of an array: dtype, shape, strides and how its address is aligned; and the C++ types."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from onnxmesh.runtime.dtypes import dtype as named
from onnxmesh.runtime.dtypes import is_narrow
from onnxmesh.runtime.kernels.registry import Array

MOST = 16
"""Bytes of the widest load or store."""

_STORED = {
    **{named(name): name for name in ("int8", "uint8", "int16", "uint16", "int64", "uint64", "bool")},
    named("int32"): "int",
    named("uint32"): "unsigned",
    named("float32"): "float",
    named("float64"): "double",
    named("float16"): "fp16",
    named("bfloat16"): "bf16",
}


class Unsuited(Exception):
    """A generator does not take this case."""


def stored(dtype: Any) -> str:
    """The C++ type in which values of `dtype` lie in memory. Raises Unsuited where there is none."""
    try:
        return _STORED[np.dtype(dtype)]
    except KeyError:
        raise Unsuited(f"dtype {dtype}") from None


def computed(dtype: Any) -> str:
    """The C++ type in which values of `dtype` are computed: float for half precision."""
    return "float" if is_narrow(dtype) and stored(dtype) else stored(dtype)


def is_floating(dtype: Any) -> bool:
    """Whether it is computed in float or double."""
    return computed(dtype) in ("float", "double")


@dataclass(frozen=True)
class Operand:
    """An array's type and layout.

    Attributes:
        strides: in elements; any sign, 0 where it is broadcast.
        alignment: the greatest power of two up to 16 that divides its address.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    alignment: int = MOST

    @staticmethod
    def of(array: Array) -> Operand:
        """The operand that `array` is: a NumPy or a CuPy array. Raises Unsuited for strides between elements."""
        data = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
        size = array.dtype.itemsize
        if any(stride % size for stride, n in zip(array.strides, array.shape) if n > 1) or data % size:
            raise Unsuited("its elements are not aligned")
        strides = tuple(0 if n == 1 else stride // size for stride, n in zip(array.strides, array.shape))
        return Operand(array.dtype, tuple(array.shape), strides, math.gcd(data, MOST))

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return int(self.dtype.itemsize)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Strides over `shape`. Raises Unsuited where it does not broadcast."""
        extra = len(shape) - len(self.shape)
        if extra < 0 or any(n not in (1, size) for n, size in zip(self.shape, shape[extra:])):
            raise Unsuited(f"{self.shape} does not broadcast to {shape}")
        return (0,) * extra + tuple(0 if n == 1 else s for n, s in zip(self.shape, self.strides))

    def viewed(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Operand:
        """The same memory with other dims."""
        return replace(self, shape=shape, strides=strides)


@dataclass(frozen=True)
class Source:
    """A kernel: C++ without the prelude, and how it is launched.

    Attributes:
        code: defines `extern "C" __global__ void NAME(...)`; its parameters are the addresses `arguments`.
        grid: blocks.
        block: threads of a block.
        arguments: for every parameter which array: inputs count from 0, outputs from -1 downwards.
    """

    name: str
    code: str
    grid: int
    block: int
    arguments: tuple[int, ...]


def source(kind: str, parameters: list[tuple[str, int]], body: list[str], grid: int, block: int) -> Source:
    """A kernel named after its kind and a digest of its text.

    Args:
        parameters: (declaration, which array), as `Source.arguments` counts.
    """
    text = "\n".join(body)
    head = ", ".join(declaration for declaration, _ in parameters)
    name = f"{kind}_{sha256(f'{head}{text}{grid} {block}'.encode()).hexdigest()[:12]}"
    code = f'extern "C" __global__ void __launch_bounds__({block}) {name}({head}) {{\n{text}\n}}\n'
    return Source(name, code, grid, block, tuple(which for _, which in parameters))
