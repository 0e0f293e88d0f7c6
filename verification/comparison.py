"""One tensor of a run beside what it should be: every rank's piece against the same piece of the expected tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Spec
from onnxmesh.runtime.views import cut_view
from onnxmesh.verification.correspondence import Tensor, global_index
from onnxmesh.verification.rounding import Bound, Judgement, Spread, allowed, judge, scale

Pieces = Mapping[int, np.ndarray]
"""What ranks hold; where they hold shares of a sum, the sum, as the piece of the first of them."""


@dataclass(frozen=True)
class Place:
    """An element: its place in the tensor and in a rank's piece."""

    index: tuple[int, ...]
    rank: int
    local: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """What came of comparing a tensor; `spread` is there where float64 was asked."""

    tensor: Tensor
    mesh: Mesh
    pieces: Pieces
    expected: np.ndarray
    size: np.ndarray
    bound: Bound
    spread: Spread | None
    judged: Mapping[int, Judgement]

    @property
    def wrong(self) -> int:
        """Elements that are wrong, of all pieces."""
        return sum(item.wrong for item in self.judged.values())

    @property
    def worst(self) -> float:
        """The largest share of what is allowed that an element is off; more than 1 is wrong."""
        return max(item.worst for item in self.judged.values())

    @property
    def largest(self) -> float:
        """The largest difference."""
        return max(item.largest for item in self.judged.values())

    def first(self) -> Place:
        """The first wrong element of the tensor, on the first rank that has it wrong."""
        places = []
        for rank, item in self.judged.items():
            if item.wrong:
                local = tuple(map(int, np.unravel_index(item.first, self.pieces[rank].shape)))
                places.append((global_index(local, self.tensor, self.mesh, rank), rank, local))
        return Place(*min(places))

    def exact(self, index: tuple[int, ...]) -> Any:
        """What float64 gives for an element; None where it was not asked."""
        return None if self.spread is None else self.spread.exact[index]

    def allowed(self, index: tuple[int, ...]) -> float:
        """How far an element may be from float64's, or else from the reference's."""
        right = self.expected[index] if self.spread is None else self.spread.exact[index]
        slack = 0.0 if self.spread is None else float(self.spread.slack[index])
        return allowed(float(np.abs(np.float64(right))), float(self.size[index]), slack, self.bound)


def compare(
    tensor: Tensor,
    mesh: Mesh,
    pieces: Pieces,
    expected: np.ndarray,
    bound: Bound,
    spread: Callable[[], Spread | None],
) -> Comparison:
    """Compare all pieces; float64 is asked (`spread`) only where the reference alone cannot clear them."""
    spec = tuple((axis, placement) for axis, placement in tensor.spec if axis not in tensor.partial_axes)
    size = scale(expected)
    judged = {rank: _judge(x, expected, size, bound, None, spec, mesh, rank) for rank, x in pieces.items()}
    exact = spread() if any(item.wrong for item in judged.values()) else None
    if exact is not None:
        size = scale(exact.exact)
        judged = {rank: _judge(x, expected, size, bound, exact, spec, mesh, rank) for rank, x in pieces.items()}
    return Comparison(tensor, mesh, pieces, expected, size, bound, exact, judged)


def _judge(
    piece: np.ndarray,
    expected: np.ndarray,
    size: np.ndarray,
    bound: Bound,
    spread: Spread | None,
    spec: Spec,
    mesh: Mesh,
    rank: int,
) -> Judgement:
    def own(array: np.ndarray) -> np.ndarray:
        return cut_view(array, spec, mesh, rank, np)

    cut = None if spread is None else Spread(own(spread.exact), own(spread.slack))
    return judge(piece, own(expected), own(size), bound, cut)
