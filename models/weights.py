"""Where the weights of a built model live: inside its file, or in one external file, sparse or streamed.

A builder asks for each weight by name, shape and spread, and gets a TensorProto. What a weight holds depends
on its name and the seed alone, so two builds give equal bytes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

DTYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float64": onnx.TensorProto.DOUBLE,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}
ALIGNMENT = 4096
BLOCK = 8 * 1024 * 1024  # elements: 16 MiB of a two-byte type
SMALL = 64 * 1024  # elements: a streamed tensor up to this size has random numbers of its own


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy type of a dtype by name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def lowest(dtype: str) -> float:
    """The least finite number of a floating dtype, with which exporters mask."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).min)


@dataclass(frozen=True)
class Weight:
    """A weight by name, drawn from a normal distribution."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    std: float
    mean: float = 0.0

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * numpy_dtype(self.dtype).itemsize

    @property
    def key(self) -> int:
        """A number that depends on the name alone."""
        return zlib.crc32(self.name.encode())

    def random(self, seed: int) -> NDArray[np.generic]:
        """The values, flat."""
        return self.scaled(np.random.default_rng([seed, self.key]).standard_normal(self.size, np.float32))

    def scaled(self, normal: NDArray[np.float32]) -> NDArray[np.generic]:
        return (normal * np.float32(self.std) + np.float32(self.mean)).astype(numpy_dtype(self.dtype))

    def proto(self) -> onnx.TensorProto:
        """A tensor of this name and shape that has no data yet."""
        return onnx.TensorProto(name=self.name, dims=self.shape, data_type=DTYPES[self.dtype])


class Weights(Protocol):
    """Makes the initialisers of one model, and afterwards writes what lies outside the model file."""

    def add(self, weight: Weight) -> onnx.TensorProto:
        """The initialiser for a weight."""

    def write(self, folder: Path) -> None:
        """Write the external data, if any, beside the model file in a folder."""


@dataclass
class InlineWeights:
    """Random weights inside the model file."""

    seed: int = 0

    def add(self, weight: Weight) -> onnx.TensorProto:
        proto = weight.proto()
        proto.raw_data = weight.random(self.seed).tobytes()
        return proto

    def write(self, folder: Path) -> None:
        pass


@dataclass
class SparseWeights:
    """Weights that take no memory and no disk: all zeros, in one external file which is a single hole."""

    location: str
    placed: list[tuple[Weight, int]] = field(default_factory=list)
    end: int = 0

    def add(self, weight: Weight) -> onnx.TensorProto:
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.placed.append((weight, offset))
        self.end = offset + weight.nbytes
        proto = weight.proto()
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in ("location", self.location), ("offset", offset), ("length", weight.nbytes):
            proto.external_data.add(key=key, value=str(value))
        return proto

    def write(self, folder: Path) -> None:
        with (folder / self.location).open("wb") as file:
            file.truncate(self.end)
            self.fill(file)

    def fill(self, file: BinaryIO) -> None:
        """Write the weights' values into the file of zeros."""


@dataclass
class StreamedWeights(SparseWeights):
    """Random weights written to the external file one by one; large ones repeat one random block."""

    seed: int = 0

    def fill(self, file: BinaryIO) -> None:
        normal: NDArray[np.float32] | None = None
        blocks: dict[tuple[str, float, float], memoryview] = {}
        for weight, offset in self.placed:
            file.seek(offset)
            if weight.size <= SMALL:
                file.write(weight.random(self.seed).tobytes())
                continue
            kind = (weight.dtype, weight.std, weight.mean)
            if kind not in blocks:
                if normal is None:
                    normal = np.random.default_rng(self.seed).standard_normal(BLOCK, np.float32)
                blocks[kind] = memoryview(weight.scaled(normal).tobytes())
            repeat(file, blocks[kind], weight)


def repeat(file: BinaryIO, block: memoryview, weight: Weight) -> None:
    """Write a weight's bytes out of a block, over and over, from a start of the weight's own."""
    itemsize = numpy_dtype(weight.dtype).itemsize
    start, left = weight.key % (len(block) // itemsize) * itemsize, weight.nbytes
    while left:
        left -= file.write(block[start : start + left])
        start = 0
