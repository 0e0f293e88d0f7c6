"""The standard's test suite: what passes is what the stored scoreboard says, and that is enough.

    python -m onnxmesh.backend --report --store

stores it anew. The tests run in pieces, which pytest's workers share.
"""

from __future__ import annotations

import fnmatch
import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.loader import load_model_tests

from onnxmesh import backend
from onnxmesh.backend import scoreboard, suite
from onnxmesh.backend.processes import spread

PIECES = 24
BOARD: dict[str, Any] = scoreboard.load()
CPU: dict[str, Any] = BOARD["devices"]["CPU"]

LEAST_PASSED = {"node": 1860, "simple": 23, "pytorch-converted": 82, "pytorch-operator": 35, "light": 9}
MOST_BY_THE_FALLBACK = 120
NATIVE = (
    *("Conv*", "*Pool", "*Normalization", "Resize", "Gather*", "Scatter*", "TopK", "Cum*", "Reduce*", "MatMul*"),
    *("Gemm", "Einsum", "*QuantizeLinear", "Cast*", "Attention", "FlexAttention", "RotaryEmbedding", "TensorScatter"),
    *("RNN", "GRU", "LSTM", "If", "Loop", "Scan", "Sequence*", "Optional*", "QLinear*"),
)
"""Families of ops that no fallback may compute."""

same_version = pytest.mark.skipif(onnx.__version__ != BOARD["onnx"], reason="the scoreboard is of another onnx")


@same_version
@pytest.mark.parametrize("piece", range(PIECES))
def test_what_passed_passes(piece: int) -> None:
    worse = []
    for name in list(suite.names())[piece::PIECES]:
        if name in CPU["exceptions"] or ("image_decoder" in name and find_spec("PIL") is None):
            continue
        outcome = suite.run_one(name)
        allowed = suite.PASSED if name in CPU["fallback"] else ("native", "folded")
        if outcome.status not in allowed:
            worse.append(f"{name}: {outcome.status} {' '.join(outcome.ops)} {outcome.reason}")
    assert not worse


@same_version
@pytest.mark.parametrize("kind", LEAST_PASSED)
def test_enough_passes(kind: str) -> None:
    tests = [name for name, of in suite.names().items() if of == kind]
    assert len(set(tests) - set(CPU["exceptions"])) >= LEAST_PASSED[kind]


def test_every_exception_has_a_reason_that_is_known() -> None:
    for name in CPU["exceptions"]:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in scoreboard.KNOWN), name


def case(name: str) -> tuple[onnx.ModelProto, list[Any], list[Any]]:
    """A node test's model, inputs and outputs."""
    suite.names()  # makes the tests, without their warnings
    found = next(item for item in load_model_tests(kind="node") if item.name == name)
    ((inputs, outputs),) = found.data_sets
    return found.model, inputs, outputs


def test_what_the_runner_cannot_compare_is_equal() -> None:
    model, inputs, (expected,) = case("test_loop16_seq_none")
    (found,) = backend.run_model(model, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_half_precision_attention_is_nearer_to_the_exact_output_than_what_is_expected() -> None:
    model, inputs, (expected,) = case("test_attention_4d_causal_fp16_expanded")
    q, k, v = (x.astype(np.float64) for x in inputs)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3])
    weights = np.exp(np.where(np.tri(*scores.shape[2:]), scores, -np.inf))
    exact = weights / weights.sum(-1, keepdims=True) @ v
    (ours,) = backend.run_model(model, inputs)
    assert np.abs(ours - exact).max() < np.abs(expected - exact).max()


def test_the_fallback_computes_little_and_nothing_that_models_are_made_of() -> None:
    assert len(CPU["fallback"]) <= MOST_BY_THE_FALLBACK
    ops = {op for ops in CPU["fallback"].values() for op in ops}
    assert not {op for op in ops if any(fnmatch.fnmatch(op.rpartition("::")[2], pattern) for pattern in NATIVE)}


def test_the_documents_show_what_is_stored() -> None:
    assert scoreboard.text(BOARD) in scoreboard.DOCUMENT.read_text()
    assert scoreboard.summary(BOARD) in scoreboard.README.read_text()


# --- the scoreboard itself ----------------------------------------------------------------------------------


def test_outcomes_become_counts_and_exceptions() -> None:
    outcomes = [
        suite.Outcome("test_a", "node", "ai.onnx", "native"),
        suite.Outcome("test_b", "node", "ai.onnx.ml", "fallback", ("ai.onnx.ml::Scaler",)),
        suite.Outcome("test_c", "simple", "ai.onnx", "failed", reason="a | b"),
    ]
    row = scoreboard.tally(outcomes, 1.2)
    assert {status: count for status, count in row["kinds"]["node"].items() if count} == {"native": 1, "fallback": 1}
    assert row["domains"]["ai.onnx.ml"]["fallback"] == 1
    assert row["fallback"] == {"test_b": ["ai.onnx.ml::Scaler"]}
    assert row["exceptions"] == {"test_c": "a | b"}
    text = scoreboard.row_text(row)
    assert "| node | 2 | 2 | 1 | 0 | 0 | 1 | 0 | 0 |" in text
    assert "| `test_c` | a \\| b |" in text
    assert "| CPU | 2 of 2 | 0 of 1 | 1 |" in scoreboard.summary({"onnx": "1.23", "devices": {"CPU": row}})


def test_a_wrong_number_is_a_failure_and_a_refusal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: None) -> None:
        raise AssertionError("Not\n equal")

    def refused(_: None) -> None:
        onnxmesh_refuses = b"no model"
        suite._BACKEND.prepare(onnx.ModelProto.FromString(b""), "CPU").run([onnxmesh_refuses])

    monkeypatch.setattr(suite, "_tests", lambda: {"test_w": ("node", wrong), "test_r": ("node", refused)})
    assert suite.run_one("test_w") == suite.Outcome("test_w", "node", "", "failed", (), "AssertionError: Not equal")
    assert suite.run_one("test_r").status == "unsupported"


def test_a_test_that_ends_its_process_fails_alone() -> None:
    def work(item: str) -> str:
        if item == "3":
            os._exit(9)
        return item * 2

    items = [str(i) for i in range(60)]
    found = spread(work, items, 2, lambda item, code: f"{item} died with {code}")
    assert found == ["3 died with 9" if item == "3" else item * 2 for item in items]
