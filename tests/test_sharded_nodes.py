"""Node tests of the standard on two ranks, by every strategy that the rules give, against one rank.

    python -m onnxmesh.backend --sharded --store

counts anew. Tests of functions that are spelled out (`_expanded`) only that command runs: they hold the same ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxmesh.backend import scoreboard, sharded, sharded_board, suite
from onnxmesh.compiler.ir.rule import Strategy
from onnxmesh.runtime.placement import Shard

PIECES = 16
LEAST_OPERATORS = 120
ROW = sharded_board.load()


@pytest.mark.parametrize("piece", range(PIECES))
def test_two_ranks_give_what_one_gives(piece: int) -> None:
    names = [name for name in sharded.names() if "_expanded" not in name][piece::PIECES]
    outcomes = [sharded.run_one(name) for name in names]
    assert not [outcome.wrong for outcome in outcomes if outcome is not None and outcome.wrong]
    assert any(outcome.cut for outcome in outcomes if outcome is not None)


def test_enough_operators_were_cut_and_none_wrongly() -> None:
    assert len(ROW["operators"]["cut"]) >= LEAST_OPERATORS and len(ROW["ops"]) >= LEAST_OPERATORS
    assert not ROW["wrong"]


def test_the_document_shows_what_is_stored() -> None:
    assert sharded_board.text(ROW) in scoreboard.DOCUMENT.read_text()


# --- the program itself -------------------------------------------------------------------------------------


def one_node(monkeypatch: pytest.MonkeyPatch, op: str, *inputs: np.ndarray) -> None:
    """Let `test_it` be a test of one node, whose output nobody looks at."""
    names = [f"x{i}" for i in range(len(inputs))]
    ports = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, x.shape) for n, x in zip(names, inputs)]
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([helper.make_node(op, names, ["y"])], "g", ports, [result]))

    def test(_: None) -> None:
        suite._BACKEND.prepare(model, "CPU").run(list(inputs))

    monkeypatch.setattr(suite, "_tests", lambda: {"test_it": ("node", test)})


def run(monkeypatch: pytest.MonkeyPatch, op: str, *inputs: np.ndarray) -> sharded.Outcome:
    one_node(monkeypatch, op, *inputs)
    outcome = sharded.run_one("test_it")
    assert outcome is not None
    return outcome


def rows(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_every_factor_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run(monkeypatch, "MatMul", rows(2, 4), rows(4, 6))
    assert outcome == sharded.Outcome("test_it", "MatMul", (("MatMul", 3),))


def test_what_cannot_be_cut_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run(monkeypatch, "Exp", rows(1, 1))
    assert outcome.whole == (("Exp", True, "none of its dims can be cut for two ranks"),) and not outcome.cut


def test_a_wrong_strategy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: ir.Graph) -> dict[ir.Node, Sequence[Strategy]]:
        cut = (Shard.plain(1, 4),)
        return {node: [Strategy("1", cut, cut)] for node in graph}

    monkeypatch.setattr(sharded, "ways_of", wrong)
    assert run(monkeypatch, "Softmax", rows(2, 4)).wrong == ("Softmax by 1: S(1) -> S(1): output 0 differs",)
    assert not run(monkeypatch, "Exp", rows(2, 4)).wrong


def test_a_test_that_does_not_run_on_one_rank_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one_node(monkeypatch, "MatMul", rows(2, 4), rows(3, 6))
    assert sharded.run_one("test_it") is None


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_floats_agree_up_to_rounding(dtype: type) -> None:
    x = np.array([1.0, 100.0, np.nan, np.inf], dtype)
    step = float(ml_dtypes.finfo(dtype).eps) * 100
    assert sharded.equal((x.astype(np.float64) + [step, step, 0, 0]).astype(dtype), x)
    assert not sharded.equal((x.astype(np.float64) + [20 * step, 0, 0, 0]).astype(dtype), x)
    assert not sharded.equal(x[::-1], x)
    assert not sharded.equal((x.astype(np.float64) + [0, step, 0, 0]).astype(dtype), x, rounding=0)


def test_integers_agree_exactly() -> None:
    x = np.array([1, 10**9])
    assert sharded.equal(x, x.copy()) and not sharded.equal(x + 1, x) and not sharded.equal(x.astype(np.int32), x)


def test_outcomes_become_counts() -> None:
    outcomes = [
        sharded.Outcome("test_a", "Gemm", (("MatMul", 3),), (("Cast", True, "small"),)),
        sharded.Outcome("test_b", "Gemm", (("MatMul", 2), ("Add", 1)), (), ("Add: differs",)),
        sharded.Outcome("test_c", "Unique", (), (("Unique", False, "the size depends on data"),)),
        sharded.Outcome("test_d", "Shape"),
    ]
    row = sharded_board.tally(5, outcomes, 1.0)
    assert row["tests"] == {"all": 5, "run": 4, "cut": 2, "whole": 1, "folded": 1}
    assert row["ops"] == {"Add": {"tests": 1, "ways": 1}, "MatMul": {"tests": 2, "ways": 5}}
    assert row["operators"]["cut"] == {"Gemm": 2} and set(row["operators"]["whole"]) == {"Shape", "Unique"}
    assert row["small"] == ["Cast"] and row["no rule"] == {"Unique": "the size depends on data"}
    assert "- `test_b`: Add: differs" in sharded_board.text(row)
