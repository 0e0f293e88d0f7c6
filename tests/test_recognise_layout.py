"""Chains of views in atoms: a route means the same as the chain that it was made from, and is as short."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from onnxmesh.passes.recognise.layout import Step, layout, route

SHAPE = (2, 6, 4, 5)


def reshape(*shape: int) -> Step:
    return Step("reshape", shape)


def transpose(*perm: int) -> Step:
    return Step("transpose", perm)


def apply(x: np.ndarray, steps: Sequence[Step]) -> np.ndarray:
    for step in steps:
        x = x.reshape(step.data) if step.kind == "reshape" else x.transpose(step.data)
    return x


@pytest.mark.parametrize(
    ("steps", "length"),
    [
        ([], 0),
        ([transpose(0, 2, 1, 3), transpose(0, 2, 1, 3)], 0),
        ([reshape(12, 20), reshape(2, 6, 4, 5)], 0),
        ([reshape(12, 4, 5), transpose(0, 2, 1), reshape(2, 6, 5, 4), transpose(0, 1, 3, 2)], 0),
        ([reshape(12, 20), reshape(2, 120)], 1),
        ([reshape(12, 4, 5), transpose(0, 2, 1), reshape(2, 6, 5, 4)], 1),
        ([transpose(0, 2, 1, 3), reshape(2, 24, 5)], 2),
        ([transpose(0, 2, 1, 3), reshape(8, 30), reshape(8, 6, 5), reshape(2, 24, 5)], 2),
        ([reshape(2, 3, 2, 20), transpose(0, 2, 1, 3)], 2),
        ([reshape(2, 3, 2, 20), transpose(0, 2, 1, 3), reshape(4, 60)], 3),
        ([reshape(1, 2, 6, 20), transpose(0, 2, 1, 3)], 2),
    ],
)
def test_route(steps: list[Step], length: int) -> None:
    result = layout(SHAPE, steps)
    assert result is not None
    path = route(result.source, result.dims)
    assert len(path) == length
    x = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    np.testing.assert_array_equal(apply(x, path), apply(x, steps))


def test_random_chains() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(rng.choice([1, 2, 3, 4], size=rng.integers(1, 5)))
        x, steps = np.arange(np.prod(shape)).reshape(shape), []
        for _ in range(rng.integers(1, 6)):
            now = apply(x, steps).shape
            if rng.random() < 0.5:
                steps.append(transpose(*rng.permutation(len(now)).tolist()))
            else:
                cut = int(rng.integers(0, len(now)))
                steps.append(reshape(*now[:cut], int(np.prod(now[cut : cut + 2])), *now[cut + 2 :]))
        result = layout(shape, steps)
        assert result is not None
        path = route(result.source, result.dims)
        assert len(path) <= 3
        np.testing.assert_array_equal(apply(x, path), apply(x, steps))


def test_a_reshape_across_atoms_is_not_told() -> None:
    assert layout((4, 6), [transpose(1, 0), reshape(4, 6)]) is None
    assert layout((0, 6), [reshape(6, 0)]) is None


def test_repetition_is_an_atom_without_origin() -> None:
    result = layout((2, 3), [reshape(2, 1, 3), Step("expand", (2, 4, 3)), reshape(8, 3)])
    assert result is not None
    assert [[(a.size, a.origin) for a in dim] for dim in result.dims] == [[(2, 0), (4, -1)], [(3, 1)]]
