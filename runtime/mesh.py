"""The mesh: how ranks are arranged along the named axes dp, cp and tp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from typing import Self

AXES = ("dp", "cp", "tp")
"""The axis names, outermost first: neighbouring ranks differ along tp."""

MAX_AXIS_SIZE = 64


@dataclass(frozen=True)
class Mesh:
    """A grid of ranks; the rank number is the row-major coordinate, with tp innermost.

    `axes` may be given in any order and may leave axes out (they get size 1); a mesh always
    holds all three in the order dp, cp, tp, so that equal meshes compare equal.

    Raises ValueError for an unknown or repeated axis, or a size outside 1..64.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        for name, size in self.axes:
            _check_axis(name)
            _check_size(name, size)
        if len(set(names)) != len(names):
            raise ValueError(f"a mesh names each axis once, got {', '.join(names)}")
        sizes = dict(self.axes)
        object.__setattr__(self, "axes", tuple((name, sizes.get(name, 1)) for name in AXES))

    @classmethod
    def of(cls, tp: int = 1, cp: int = 1, dp: int = 1) -> Self:
        """The mesh with these axis sizes."""
        return cls((("dp", dp), ("cp", cp), ("tp", tp)))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(size for _, size in self.axes)

    def axis_size(self, name: str) -> int:
        """The number of ranks along one axis. Raises ValueError for an unknown axis."""
        _check_axis(name)
        return dict(self.axes)[name]

    def coordinate(self, rank: int) -> dict[str, int]:
        """The position of `rank` along each axis. Raises ValueError if there is no such rank."""
        if not 0 <= rank < self.size:
            raise ValueError(f"mesh {self} has ranks 0 to {self.size - 1}, got {rank}")
        position = {}
        for name, size in reversed(self.axes):
            rank, position[name] = divmod(rank, size)
        return {name: position[name] for name in AXES}

    def rank(self, coordinate: Mapping[str, int]) -> int:
        """The rank at `coordinate`; axes left out count as 0. Raises ValueError outside the mesh."""
        for name, index in coordinate.items():
            if not 0 <= index < self.axis_size(name):
                raise ValueError(f"mesh {self} has no index {index} along {name}")
        number = 0
        for name, size in self.axes:
            number = number * size + coordinate.get(name, 0)
        return number

    def group(self, rank: int, axes: str | Sequence[str]) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axes`, itself included.

        They come in mesh order, whatever the order of `axes`; a rank's position in its group along
        one axis is therefore its coordinate there. Raises ValueError for an unknown axis or rank.
        """
        return _group(self, rank, _names(axes))

    def groups(self, axes: str | Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """All groups along `axes`, ordered by their first rank; together they hold each rank once."""
        names = _names(axes)
        return tuple(dict.fromkeys(_group(self, rank, names) for rank in range(self.size)))

    def to_json(self) -> dict[str, int]:
        """The axis sizes, outermost first: `{"dp": 1, "cp": 2, "tp": 4}`."""
        return dict(self.axes)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The mesh that `to_json` wrote. Raises ValueError if `value` is not such an object."""
        if not isinstance(value, Mapping):
            raise ValueError(f'a mesh is an object such as {{"dp": 1, "cp": 2, "tp": 4}}, got {value!r}')
        return cls(tuple(value.items()))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)


@cache
def _group(mesh: Mesh, rank: int, names: tuple[str, ...]) -> tuple[int, ...]:
    here = mesh.coordinate(rank)
    spans = [range(size) if name in names else (here[name],) for name, size in mesh.axes]
    return tuple(mesh.rank(dict(zip(AXES, point))) for point in product(*spans))


def _names(axes: str | Sequence[str]) -> tuple[str, ...]:
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    for name in names:
        _check_axis(name)
    return names


def _check_axis(name: object) -> None:
    if name not in AXES:
        raise ValueError(f"unknown mesh axis {name!r}: the axes are {', '.join(AXES)}")


def _check_size(name: str, size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_AXIS_SIZE:
        raise ValueError(f"mesh axis {name} must be a whole number from 1 to {MAX_AXIS_SIZE}, got {size!r}")
