"""Which constant masks are positions: key j is seen by query i exactly if `k_pos[j] <= q_pos[i]`.

That holds where of any two queries one sees all that the other sees: causal masks, with tokens before them or with a
prefix that all see, blocks of tokens, windows that are open at one end. Such a matrix of zeros and ones is the only
one with its sums over rows and columns (Gale, Ryser, 1957), so the sums tell it, and the positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.match import shape_of
from onnxmesh.passes.recognise.mask_values import Unknown, blocks

HIDES = -1e4
"""A score of at most this has no weight beside any score that a model gives."""

KNOWN = "known mask"
"""`meta` key of a value: what was found out about it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a constant mask lets the queries see: `every` key, or `some` key each. Where all of the batch is alike,
    `rows` are the keys of each query, `columns` the queries of each key, int64; and where every query sees neighbours,
    `runs` are the first key of each and the one behind its last. `hides` is the one number beside zero
    that an additive mask has, if it hides.
    """

    every: bool
    some: bool
    hides: float | None = None
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    runs: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def positions(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(q_pos [s], k_pos [t]), int64, where they say the same. They count from 0 where the mask is a triangle."""
        if self.rows is None or self.columns is None:
            return None
        for q, k in _candidates(self.rows, self.columns):
            by_row = np.searchsorted(np.sort(k), q, side="right")
            by_column = len(q) - np.searchsorted(np.sort(q), k, side="left")
            if np.array_equal(by_row, self.rows) and np.array_equal(by_column, self.columns):
                return q, k
        return None


def _candidates(rows: np.ndarray, columns: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Positions that count up by one, then a key's position by how many keys are seen by more queries."""
    s, t = len(rows), len(columns)
    partly = np.flatnonzero((rows > 0) & (rows < t))
    if partly.size or t == 1:
        i = partly[0] if partly.size else 0
        yield np.arange(s) + rows[i] - 1 - i, np.arange(t)
    elif s and rows[-1] == t and (rows[:-1] == 0).all():
        yield np.arange(s) + t - s, np.arange(t)
    order = np.sort(-columns)
    yield rows - 1, np.searchsorted(order, -columns, side="left")


def seen_by(value: ir.Value, negated: bool = False) -> Seen | None:
    """What a mask of constants lets see: a boolean one where it is true, another where it is zero; with `negated`
    elsewhere. None where the mask hangs on data.
    """
    kept = value.meta.get(KNOWN)
    if kept is None:
        kept = value.meta[KNOWN] = {}
    if negated not in kept:
        try:
            kept[negated] = _look(value, negated)
        except Unknown:
            kept[negated] = None
    found = kept[negated]
    assert found is None or isinstance(found, Seen)
    return found


def _look(value: ir.Value, negated: bool) -> Seen | None:
    rows, first, end = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    columns = np.zeros(shape_of(value)[-1:], np.int64)
    alike, some = True, True
    numbers: set[float] = set()
    for block in blocks(value):
        if block.dtype != bool:
            numbers.update(np.unique(block[block != 0]).astype(np.float64)[:2].tolist())
            block = block == 0
        seen = (block != negated).reshape(-1, *block.shape[-2:])
        some = some and bool(seen.any(axis=-1).all())
        alike = alike and bool((seen == seen[:1]).all())
        rows.append(seen[0].sum(axis=1))
        columns += seen[0].sum(axis=0)
        first.append(seen[0].argmax(axis=1))
        end.append(len(columns) - seen[0, :, ::-1].argmax(axis=1))
    every = alike and all(bool((keys == len(columns)).all()) for keys in rows)
    hides = numbers.pop() if len(numbers) == 1 else 0.0
    found = Seen(every, some, hides if hides <= HIDES else None)
    if not alike:
        return found
    keys, starts, ends = (np.concatenate(parts) for parts in (rows, first, end))
    neighbours = some and np.array_equal(ends - starts, keys)
    return replace(found, rows=keys, columns=columns, runs=(starts, ends) if neighbours else None)
