"""Models with recurrent layers, exported by torch, against ONNX Runtime: alone, and with batch or linears shared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import onnxmesh
from onnxmesh.runtime.placement import Shard
from onnxmesh.runtime.plan import Launch, Plan

FILES = sorted((Path(__file__).parent / "recurrent").glob("*.onnx"))
MESHES: list[dict[str, int]] = [{}, {"dp": 2}, {"tp": 2}, {"dp": 2, "tp": 2}, {"dp": 3}]
LENGTHS = np.array([7, 6, 3, 1])


def inputs(path: Path) -> dict[str, np.ndarray]:
    """Random words; sequences of falling lengths."""
    rng, feeds = np.random.default_rng(0), {}
    for value in onnx.load(path).graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        words = rng.integers(0, 40, shape).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        feeds[value.name] = LENGTHS if value.name == "lengths" else words
    return feeds


def layers(plan: Plan) -> list[Launch]:
    (program,) = plan.programs
    return [i for i in program.instructions if isinstance(i, Launch) and i.kernel in ("LSTM", "GRU")]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_exported_model_computes_what_onnxruntime_computes(path: Path, mesh: dict[str, int]) -> None:
    feeds = inputs(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    plan = onnxmesh.compile(path, **mesh)
    with onnxmesh.Session(plan) as ours:
        for a, b in zip(ours.run(None, feeds), session.run(None, feeds), strict=True):
            np.testing.assert_allclose(a, b, 1e-4, 1e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ranks_of_dp_run_their_own_sequences(path: Path) -> None:
    alone, shared = (onnxmesh.compile(path, dp=ranks) for ranks in (1, 2))
    for one, half in zip(layers(alone), layers(shared), strict=True):
        sizes = [plan.programs[0].buffers[layer.ins[0]].nbytes for plan, layer in ((alone, one), (shared, half))]
        assert sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ranks_of_tp_hold_their_part_of_the_linears(path: Path) -> None:
    plan = onnxmesh.compile(path, tp=2)
    assert any(isinstance(placement, Shard) for weight in plan.weights for _, placement in weight.spec)
