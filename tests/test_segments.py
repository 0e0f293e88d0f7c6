"""The algebra of segments, as a specification: cuts in the notation of placements (`8`, `3*`, `6~2`)."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest

from onnxmesh.compiler.ir import segments as algebra
from onnxmesh.runtime.placement import Segment, Segments, Shard, cut, join

RANKS = 4


def read(text: str, ranks: int = RANKS) -> Segments:
    """`8,3*,6~2`: a segment of 8, one of 3 that is whole on every rank, one of 6 with each part on 2 ranks."""
    return tuple(_segment(part, ranks) for part in text.split(",") if part)


def _segment(part: str, ranks: int) -> Segment:
    if part.endswith("*"):
        return Segment(int(part[:-1]), ranks)
    size, _, copies = part.partition("~")
    return Segment(int(size), int(copies or 1))


def write(segments: Segments, ranks: int = RANKS) -> str:
    return ",".join(segment.text(ranks) for segment in segments)


# --- natural cuts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "ranks", "want"),
    [
        (8, 4, ["8"]),
        (4, 4, ["4"]),
        (6, 4, ["6~2", "4,2*"]),
        (13, 4, ["12,1*"]),
        (14, 4, ["14~2", "12,2*"]),
        (2, 4, ["2~2"]),
        (3, 4, []),
        (1, 4, []),
        (0, 4, []),
        (5, 2, ["4,1*"]),
        (24, 5, ["20,4*"]),
    ],
)
def test_natural_cuts_of_a_dim(size: int, ranks: int, want: list[str]) -> None:
    assert [write(found, ranks) for found in algebra.natural(size, ranks)] == want


@pytest.mark.parametrize(("size", "ranks"), product(range(2, 30), range(2, 9)))
def test_natural_cuts_fit_and_fill_the_dim(size: int, ranks: int) -> None:
    for found in algebra.natural(size, ranks):
        assert algebra.fits(found, ranks)
        assert sum(segment.size for segment in found) == size


def test_a_cut_fits_where_every_segment_divides_and_something_is_cut() -> None:
    assert algebra.fits(read("8,3*"), RANKS)
    assert algebra.fits(read("6~2"), RANKS)
    assert not algebra.fits(read("6"), RANKS)
    assert not algebra.fits(read("8,3*").__add__((Segment(4, 3),)), RANKS)
    assert not algebra.fits(read("3*,5*"), RANKS)
    assert algebra.is_whole(read("3*,5*"), RANKS)
    assert algebra.is_whole(algebra.whole(7, RANKS), RANKS)
    assert not algebra.is_whole(read("3*,8"), RANKS)


# --- concatenation and its inverse ------------------------------------------------------------------------------


def test_the_cut_of_a_concatenation_is_the_cuts_in_a_row() -> None:
    assert write(algebra.concat([read("8"), read("3*"), read("4,6~2")])) == "8,3*,4,6~2"


@pytest.mark.parametrize(
    ("joined", "sizes", "want"),
    [
        ("8,4", [8, 4], ["8", "4"]),
        ("8,4,4", [8, 8], ["8", "4,4"]),
        ("512,333*", [512, 333], ["512", "333*"]),
        ("12", [8, 4], None),  # a boundary inside a segment
        ("8,4", [8], None),  # something is left over
        ("8", [8, 4], None),  # something is missing
        ("8,4", [0, 8, 4, 0], ["", "8", "4", ""]),
    ],
)
def test_pieces_take_whole_segments(joined: str, sizes: list[int], want: list[str] | None) -> None:
    pieces = algebra.split(read(joined), sizes)
    assert (None if pieces is None else [write(piece) for piece in pieces]) == want


# --- reshape ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [
        ((2, 3, 4), (6, 4), [((0, 1), (0,)), ((2,), (1,))]),
        ((6, 4), (6, 2, 2), [((0,), (0,)), ((1,), (1, 2))]),
        ((4, 6), (6, 4), [((0, 1), (0, 1))]),
        ((5,), (5,), [((0,), (0,))]),
        ((5, 1), (5,), [((0,), (0,)), ((1,), ())]),
    ],
)
def test_groups_are_the_smallest_runs_of_dims_with_the_same_elements(
    before: tuple[int, ...], after: tuple[int, ...], want: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    found = [(tuple(a), tuple(b)) for a, b in algebra.groups(before, after)]
    assert found == want


RESHAPES = [
    # flattening [b, s, h] with s cut gives a segment for every b
    ((2, 8, 3), (16, 3), 1, "8", (0, "8,8")),
    ((16, 3), (2, 8, 3), 0, "8,8", (1, "8")),
    ((16, 3), (2, 8, 3), 0, "16", None),  # b does not divide
    ((4, 8, 3), (32, 3), 0, "4", (0, "32")),
    # heads
    ((2, 3, 32), (2, 3, 8, 4), 2, "32", (2, "8")),
    ((2, 3, 8, 4), (2, 3, 32), 2, "8", (2, "32")),
    ((2, 3, 8, 4), (2, 3, 32), 3, "4", (2, ",".join(["4"] * 8))),  # interleaved
    ((2, 3, 16), (2, 3, 2, 8), 2, "16", None),  # 2 heads on 4 ranks
    ((2, 3, 16), (2, 3, 2, 8), 2, "16~2", (2, "2~2")),
    # fused q, k, v
    ((5, 24), (5, 3, 8), 1, "8,8,8", (2, "8")),
    ((5, 24), (5, 3, 8), 1, "24", None),
    ((5, 3, 8), (5, 24), 2, "8", (1, "8,8,8")),
    ((5, 96), (5, 3, 8, 4), 1, "32,32,32", (2, "8")),
    # whole segments
    ((13, 4), (1, 13, 4), 0, "12,1*", (1, "12,1*")),
    ((1, 13, 8), (13, 8), 1, "12,1*", (0, "12,1*")),
    ((2, 13), (26,), 1, "12,1*", (0, "12,1*,12,1*")),
    # dims that the reshape does not touch, and empty tensors
    ((2, 8, 6), (2, 8, 3, 2), 1, "8", (1, "8")),
    ((8, 0), (0, 4), 0, "8", None),
]


@pytest.mark.parametrize(("before", "after", "dim", "given", "want"), RESHAPES)
def test_reshape_finds_the_dim_that_holds_the_same_elements(
    before: tuple[int, ...], after: tuple[int, ...], dim: int, given: str, want: tuple[int, str] | None
) -> None:
    found = algebra.reshape(before, after, dim, read(given), RANKS)
    assert (None if found is None else (found[0], write(found[1]))) == want


@pytest.mark.parametrize(("before", "after", "dim", "given", "want"), [case for case in RESHAPES if case[4]])
def test_reshape_of_the_pieces_is_the_pieces_of_the_reshape(
    before: tuple[int, ...], after: tuple[int, ...], dim: int, given: str, want: tuple[int, str]
) -> None:
    x = np.arange(prod(before)).reshape(before)
    target = Shard(want[0], read(want[1]))
    for rank in range(RANKS):
        piece = cut(x, Shard(dim, read(given)), RANKS, rank, np)
        expected = cut(x.reshape(after), target, RANKS, rank, np)
        np.testing.assert_array_equal(piece.reshape(expected.shape), expected)


# --- heads of keys and values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "group", "want"),
    [
        ("8", 1, "8"),
        ("8", 2, "4"),
        ("8", 4, "2~2"),  # a kv head on two ranks
        ("4", 4, "1*"),  # one kv head on all: multi-query attention
        ("16~2", 4, "4~2"),
        ("8,4*", 2, "4,2*"),
        ("8,8", 2, "4,4"),
        ("12", 2, None),  # 3 query heads a rank do not hold whole groups of 2
        ("8,8", 4, "2~2,2~2"),
        ("8,16", 4, None),  # groups of 2 and of 4 in one call
    ],
)
def test_kv_heads_follow_the_query_heads(queries: str, group: int, want: str | None) -> None:
    found = algebra.kv_heads(read(queries), group, RANKS)
    assert (None if found is None else write(found)) == want


@pytest.mark.parametrize(("queries", "group"), [("8", 2), ("8", 4), ("4", 4), ("8,4*", 2), ("16~2", 4), ("8,8", 4)])
def test_every_rank_has_the_kv_heads_of_its_query_heads(queries: str, group: int) -> None:
    q = read(queries)
    kv = algebra.kv_heads(q, group, RANKS)
    assert kv is not None
    heads = np.arange(sum(s.size for s in q))
    for rank in range(RANKS):
        ours = cut(heads, Shard(0, q), RANKS, rank, np)
        keys = cut(heads[: len(heads) // group], Shard(0, kv), RANKS, rank, np)
        np.testing.assert_array_equal(ours // group, np.repeat(keys, len(ours) // len(keys)))


# --- a second axis ----------------------------------------------------------------------------------------------

FIRST = 2
THROUGH = [
    # first axis, what a rank of it has left cut on the second, the same in the gathered dim
    ("16", "8", "8,8"),
    ("16,32", "8,16", "8,8,16,16"),
    ("16,3*", "8,3*", "8,8,3*"),
    ("16,8*", "8,8", "8,8,8"),
    ("32", "8,8", "8,8,8,8"),
    ("16,32", "24", None),  # a boundary of the first axis falls inside a segment
]


@pytest.mark.parametrize(("first", "local", "gathered"), THROUGH)
def test_a_gather_repeats_the_cut_for_every_part(first: str, local: str, gathered: str | None) -> None:
    found = algebra.through(_second(local), read(first, FIRST), FIRST, gather=True)
    assert found == (None if gathered is None else _second(gathered))


@pytest.mark.parametrize(("first", "local", "gathered"), [case for case in THROUGH if case[2]])
def test_a_scatter_is_the_way_back(first: str, local: str, gathered: str) -> None:
    assert algebra.through(_second(gathered), read(first, FIRST), FIRST, gather=False) == _second(local)


def test_a_scatter_wants_the_parts_cut_alike() -> None:
    assert algebra.through(_second("16"), read("16", FIRST), FIRST, gather=False) is None
    assert algebra.through(_second("4,12"), read("16", FIRST), FIRST, gather=False) is None
    assert algebra.through(_second("4,8,4"), read("16", FIRST), FIRST, gather=False) is None


@pytest.mark.parametrize(("first", "local", "gathered"), [case for case in THROUGH if case[2]])
def test_gathering_pieces_of_both_axes_gives_the_pieces_of_the_second(first: str, local: str, gathered: str) -> None:
    held = Shard(0, read(first, FIRST))
    x = np.arange(held.size)
    inner, outer = Shard(0, _second(local)), Shard(0, _second(gathered))
    left = tuple(
        Segment(sum(s.local(RANKS) for s in piece), s.copies)
        for piece, s in zip(_by_segment(gathered, first), held.segments)
    )
    for rank in range(RANKS):
        pieces = [cut(cut(x, held, FIRST, i, np), inner, RANKS, rank, np) for i in range(FIRST)]
        np.testing.assert_array_equal(join(pieces, Shard(0, left), np), cut(x, outer, RANKS, rank, np))


def _second(text: str) -> Segments:
    return read(text, RANKS)


def _by_segment(gathered: str, first: str) -> list[Segments]:
    pieces = algebra.split(_second(gathered), [s.size for s in read(first, FIRST)])
    assert pieces is not None
    return pieces
