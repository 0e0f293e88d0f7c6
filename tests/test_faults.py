"""Ranks as processes that are killed or stopped: the others end, and say why. On GPUs: tests/gpu/faults.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

from faults import APART, CONTROLLED, Case, make_plan, run_case


@pytest.mark.parametrize("case", APART + CONTROLLED, ids=str)
def test_no_rank_survives_another_one(case: Case, tmp_path: Path) -> None:
    make_plan(tmp_path / "a.plan", ranks=2, size=8)
    outcome = run_case(case, tmp_path / "a.plan", ranks=2, device="cpu", timeout=3)
    assert not outcome.wrong, outcome
