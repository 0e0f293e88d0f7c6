"""Device profiles: how fast one kind of GPU and its links are, as numbers, and the times that follow from them.

A profile is what `onnxmesh doctor --profile FILE` measures (docs/profile.md). The compiler chooses placements and
predicts times by it. Times are microseconds, rates are a microsecond's.

Contractions and attention follow a roofline: work comes in tiles, tiles in waves over the multiprocessors
(https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/), and no kernel is faster than
its memory. Everything else, and every collective, is a measured curve over bytes.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from typing import Any

from onnxmesh.runtime.errors import InvalidArgument

FORMAT = 1
COLLECTIVES = ("AllReduce", "ReduceScatter", "AllGather", "AllToAll", "Shift")
"""The kinds that are measured."""

_LIKE = {"Broadcast": "AllGather", "GatherTo": "AllGather", "ReduceTo": "ReduceScatter", "ScatterFrom": "ReduceScatter"}
"""What the others are taken to be as fast as."""

_TILES = ((128, 256, 1.0), (128, 128, 0.85), (64, 256, 0.8), (64, 128, 0.7))
"""Rows and columns of the tiles that a product may be cut into, and how fast each is against the first."""
_SPLITS = (1, 2, 3, 4, 5, 6, 8)
"""Into how many parts the summed dim of a product may be cut, so that few tiles still fill the device."""
_ROWS = 128
"""Queries of one tile of attention."""


@dataclass(frozen=True)
class Curve:
    """Microseconds over a size: straight lines between points, level before the first, straight on after the last.

    Attributes:
        points: (size, microseconds), of growing sizes.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def line(cls, alpha: float, rate: float) -> Curve:
        """alpha + size / rate."""
        return cls(((0.0, alpha), (1e9, alpha + 1e9 / rate)))

    @classmethod
    def through(cls, points: Mapping[float, float]) -> Curve:
        """Through measured points; where noise makes a larger size faster, it takes the smaller one's time."""
        found, highest = [], 0.0
        for size in sorted(points):
            highest = max(highest, points[size])
            found.append((float(size), highest))
        return cls(tuple(found))

    @property
    def alpha(self) -> float:
        """What the smallest size takes."""
        return self.points[0][1]

    @property
    def rate(self) -> float:
        """Size a microsecond, of large sizes: beyond what the smallest takes."""
        size, time = self.points[-1]
        return (size - self.points[0][0]) / max(time - self.alpha, 1e-9) if len(self.points) > 1 else inf

    def __call__(self, size: float) -> float:
        """Microseconds for a size."""
        at = bisect_left(self.points, (size, -inf))
        if at == 0:
            return self.alpha
        if at == len(self.points):
            at = len(self.points) - 1
        if at == 0:
            return self.alpha + size / self.rate
        (x0, y0), (x1, y1) = self.points[at - 1], self.points[at]
        return y0 + (size - x0) * (y1 - y0) / (x1 - x0)


@dataclass(frozen=True)
class Gemm:
    """Products of matrices of one dtype.

    Attributes:
        rate: FLOPs a microsecond with every multiprocessor busy.
        bandwidth: bytes a microsecond where weights stream from memory.
        overhead: microseconds of a kernel at the least.
    """

    rate: float
    bandwidth: float
    overhead: float

    def __call__(self, batch: float, m: int, n: int, k: int, nbytes: float, processors: int) -> float:
        """Microseconds of `batch` products [m, k] x [k, n], which read and write `nbytes`."""
        per_tile = processors * 2.0 * k / self.rate
        work = min(
            _waves(batch * ceil(m / rows) * ceil(n / columns), processors, _SPLITS) * rows * columns * per_tile / speed
            for rows, columns, speed in _TILES
        )
        return self.overhead + max(work, nbytes / self.bandwidth)


@dataclass(frozen=True)
class Attention:
    """Attention of one dtype.

    Attributes:
        rate: FLOPs a microsecond with every multiprocessor busy.
        causal_rate: the same of causal attention, of which only what is seen is counted.
        bandwidth: bytes a microsecond, where queries are few.
        overhead: microseconds of a kernel at the least.
    """

    rate: float
    causal_rate: float
    bandwidth: float
    overhead: float

    def __call__(
        self, heads: float, s: int, t: int, widths: int, *, causal: bool, nbytes: float, processors: int
    ) -> float:
        """Microseconds of `heads` heads with s queries and t keys; `widths` is that of k and that of v together."""
        if causal:  # tiles differ in length and fill each other's gaps
            work = heads * s * (t + 1) * widths / self.causal_rate
        else:
            tiles = heads * ceil(s / _ROWS)
            parts = _waves(tiles, processors, (1,) if s > _ROWS else _SPLITS)
            work = parts * processors * 2.0 * min(_ROWS, -(-s // 16) * 16) * t * widths / self.rate
        return self.overhead + max(work, nbytes / self.bandwidth)


def _waves(tiles: float, processors: int, splits: tuple[int, ...]) -> float:
    """How often every multiprocessor is given a whole tile, if tiles may be split."""
    return min(ceil(tiles * split / processors) / split for split in splits)


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of one kind of GPU and of the links between GPUs.

    Attributes:
        name: what reports call it.
        processors: multiprocessors.
        gemm, attention: by dtype.
        memory: of elementwise kernels and everything else that is bound by memory, over bytes read and written.
        links: of collectives by kind and number of ranks, over the bytes that one rank sends.
        contention: how much longer computation takes while a collective runs beside it.
        about: when, where and with which versions it was measured; no part of the model.
    """

    name: str
    processors: int
    gemm: Mapping[str, Gemm]
    attention: Mapping[str, Attention]
    memory: Curve
    links: Mapping[str, Mapping[int, Curve]]
    contention: float = 1.0
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def launch(self) -> float:
        """Microseconds of a kernel at the least."""
        return self.memory.alpha

    def product(self, dtype: str) -> Gemm:
        """How products of a dtype run; of one that was not measured, as the slowest that was."""
        return _of(self.gemm, dtype)

    def attending(self, dtype: str) -> Attention:
        """How attention of a dtype runs; of one that was not measured, as the slowest that was."""
        return _of(self.attention, dtype)

    def link(self, kind: str, ranks: int) -> Curve:
        """How a collective runs on so many ranks, or on the nearest number of them that was measured."""
        curves = self.links[_LIKE.get(kind, kind)]
        return curves[min(curves, key=lambda count: (abs(count - ranks), -count))]

    def to_json(self) -> dict[str, Any]:
        """The profile as JSON data, which `from_json` reads."""
        return {
            "format": FORMAT,
            "name": self.name,
            "about": dict(self.about),
            "processors": self.processors,
            "gemm": {dtype: vars(model) for dtype, model in self.gemm.items()},
            "attention": {dtype: vars(model) for dtype, model in self.attention.items()},
            "memory": [list(point) for point in self.memory.points],
            "links": {
                kind: {str(ranks): [list(point) for point in curve.points] for ranks, curve in curves.items()}
                for kind, curves in self.links.items()
            },
            "contention": self.contention,
        }

    @classmethod
    def from_json(cls, value: Any) -> DeviceProfile:
        """The profile that `to_json` wrote. Raises ValueError for anything else."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']}, not {FORMAT}")
            found = cls(
                name=str(value["name"]),
                processors=int(value["processors"]),
                gemm={dtype: Gemm(**_numbers(model)) for dtype, model in value["gemm"].items()},
                attention={dtype: Attention(**_numbers(model)) for dtype, model in value["attention"].items()},
                memory=_curve(value["memory"]),
                links={
                    kind: {int(ranks): _curve(points) for ranks, points in value["links"][kind].items()}
                    for kind in COLLECTIVES
                },
                contention=float(value["contention"]),
                about=dict(value["about"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not (found.gemm and found.attention and found.processors > 0 and all(found.links.values())):
            raise ValueError("a rate is missing")
        return found


def load(path: str | os.PathLike[str]) -> DeviceProfile:
    """The profile in a file.

    Raises:
        InvalidArgument: there is no such file, or it holds no profile.
    """
    try:
        return DeviceProfile.from_json(json.loads(Path(path).read_text()))
    except OSError as error:
        raise InvalidArgument(f"device profile '{path}': {error.strerror}", code="OM5205") from error
    except ValueError as error:
        raise InvalidArgument(
            f"'{path}' is not a device profile: {error}",
            hint="onnxmesh doctor --profile FILE measures one",
            code="OM5205",
        ) from error


def _of(models: Mapping[str, Any], dtype: str) -> Any:
    half = {"float16": "bfloat16", "bfloat16": "float16"}.get(dtype, "")
    found = models.get(dtype) or models.get(half)
    return found or min(models.values(), key=lambda model: model.rate)


def _numbers(value: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: float(number) for name, number in value.items()}
    if not all(0 < number < inf for number in numbers.values()):
        raise ValueError(f"rates are greater than 0, got {numbers}")
    return numbers


def _curve(points: Any) -> Curve:
    curve = Curve(tuple((float(size), float(time)) for size, time in points))
    sizes, times = zip(*curve.points) if curve.points else ((), ())
    if not sizes or list(sizes) != sorted(set(sizes)) or list(times) != sorted(times) or times[0] <= 0:
        raise ValueError(f"a curve grows: {points}")
    return curve
