"""Graphs that were sharded elsewhere, on 2 and 4 GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_imported_collectives import REDUCE, WEIGHTS, Graph, OnnxRuntime, TensorRT, X, block, dist, expected, share

import onnxmesh


def run(plan: onnxmesh.Plan) -> list[np.ndarray]:
    """The outputs of a second run, which is a CUDA graph's."""
    with onnxmesh.Session(plan, "cuda", timeout=30) as session:
        for _ in range(3):
            outputs = session.run(None, {"x": X})
    return outputs


@pytest.mark.parametrize("sends", [TensorRT, OnnxRuntime])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_block_sharded_elsewhere(sends: Any, ranks: int, gpus: Any) -> None:
    gpus(ranks)
    files = [block(share(rank, ranks), sends=sends(ranks)) for rank in range(ranks)]
    for model in (files, block(WEIGHTS, sends=sends(ranks), by_rows=True)):
        np.testing.assert_allclose(run(onnxmesh.compile(model))[0], expected(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_operation(ranks: int, gpus: Any) -> None:
    gpus(ranks)
    moves = [("broadcast", 1), ("gather", 1), ("scatter", 1), ("all_gather", -1), ("all_to_all", -1)]
    operations = [(name, "none", root) for name, root in moves]
    operations += [(name, op, root) for name, root in (("all_reduce", -1), ("reduce", 1)) for op in REDUCE]
    operations += [("reduce_scatter", op, -1) for op in REDUCE]
    models = []
    for rank in range(ranks):
        g = Graph(own=np.array(rank + 0.5, np.float32))
        x = g("Mul", "x", "own")
        models.append(g.model(*(dist(g, name, x, ranks, op, root) for name, op, root in operations)))
    plan = onnxmesh.compile(models)
    with onnxmesh.Session(plan) as session:
        on_host = session.run(None, {"x": X})
    for operation, got, want in zip(operations, run(plan), on_host, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=str(operation))
