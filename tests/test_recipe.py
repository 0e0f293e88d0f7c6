"""Recipes: their values, their sources, their shards, and what is refused."""

from __future__ import annotations

import base64
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial, Segment, Shard
from onnxmesh.runtime.recipe import evaluate, evaluate_shard, sources

MODEL = {"w": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.arange(6, dtype=ml_dtypes.bfloat16)}
W = {"op": "source", "name": "w"}
DATA = base64.b64encode(np.array([1, 2], np.int64).tobytes()).decode()

VALUES: list[tuple[dict[str, Any], np.ndarray]] = [
    (W, MODEL["w"]),
    ({"op": "constant", "dtype": "int64", "shape": [2, 1], "data": DATA}, np.array([[1], [2]])),
    ({"op": "transpose", "perm": [1, 0], "of": W}, MODEL["w"].T),
    ({"op": "reshape", "shape": [8, 3], "of": W}, MODEL["w"].reshape(8, 3)),
    ({"op": "slice", "axis": 1, "start": 2, "stop": 5, "of": W}, MODEL["w"][:, 2:5]),
    ({"op": "concat", "axis": 0, "of": [W, W]}, np.concatenate([MODEL["w"]] * 2)),
    ({"op": "cast", "dtype": "bfloat16", "of": W}, MODEL["w"].astype(ml_dtypes.bfloat16)),
    ({"op": "pad", "pads": [0, 1, 2, 0], "of": W}, np.pad(MODEL["w"], [(0, 2), (1, 0)])),
    ({"op": "expand", "shape": [2, *MODEL["w"].shape], "of": W}, np.stack([MODEL["w"]] * 2)),
    ({"op": "mul", "by": 0.5, "of": W}, MODEL["w"] / 2),
    ({"op": "mul", "by": 0.125, "of": {"op": "source", "name": "b"}}, MODEL["b"] / np.array(8, ml_dtypes.bfloat16)),
]


@pytest.mark.parametrize(("recipe", "want"), VALUES, ids=lambda x: x["op"] if isinstance(x, dict) else "")
def test_value(recipe: dict[str, Any], want: np.ndarray) -> None:
    got = evaluate(recipe, MODEL.__getitem__)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_sources_come_once_and_in_order() -> None:
    b = {"op": "reshape", "shape": [1, 6], "of": {"op": "source", "name": "b"}}
    assert sources({"op": "concat", "axis": 0, "of": [W, b, {"op": "mul", "by": 2, "of": W}]}) == ["w", "b"]


def test_shards_are_cut_in_the_order_of_the_axes() -> None:
    spec = (("cp", Shard(0, (Segment(4),))), ("tp", Shard(1, (Segment(2), Segment(4)))))
    mesh = Mesh.of(tp=2, cp=2)
    got = evaluate_shard(W, MODEL.__getitem__, spec, mesh, {"dp": 0, "cp": 1, "tp": 1})
    np.testing.assert_array_equal(got, MODEL["w"][2:][:, [1, 4, 5]])


def test_a_partial_constant_is_held_by_the_first_rank() -> None:
    spec, mesh = (("tp", Partial()),), Mesh.of(tp=2)
    shards = [evaluate_shard(W, MODEL.__getitem__, spec, mesh, mesh.coordinate(rank)) for rank in range(2)]
    np.testing.assert_array_equal(shards[0] + shards[1], MODEL["w"])
    assert not shards[1].any()


def nested(depth: int) -> dict[str, Any]:
    return W if depth == 0 else {"op": "mul", "by": 1, "of": nested(depth - 1)}


@pytest.mark.parametrize("recipe", [
    {"op": "exec", "name": "w"}, {"op": "source"}, {"op": "source", "name": 3}, {**W, "more": 1}, [], None,
    {"op": "transpose", "perm": ["0"], "of": W}, {"op": "concat", "axis": 0, "of": []},
    {"op": "concat", "axis": 0, "of": [W, 1]}, {"op": "cast", "dtype": "object", "of": W},
    {"op": "reshape", "shape": [5, 5], "of": W}, {"op": "slice", "axis": 0, "start": 3, "stop": 9, "of": W},
    {"op": "slice", "axis": 5, "start": 0, "stop": 1, "of": W}, {"op": "pad", "pads": [1], "of": W},
    {"op": "transpose", "perm": [1, 1], "of": W}, {"op": "mul", "by": True, "of": W}, nested(70),
    {"op": "constant", "dtype": "int64", "shape": [3], "data": DATA},
    {"op": "constant", "dtype": "int64", "shape": [2], "data": "*"},
])  # fmt: skip
def test_a_wrong_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(PlanError, match="recipe"):
        evaluate(recipe, MODEL.__getitem__)
