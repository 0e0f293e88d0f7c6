"""Ranks on GPUs that are killed or stopped: see faults.py, which shows it as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faults import APART, CONTROLLED, FREE, Case, free_memory, make_plan, run_case


@pytest.mark.parametrize("case", APART + CONTROLLED, ids=str)
def test_no_rank_survives_and_memory_is_free(
    case: Case, gpus: Callable[[int], None], tmp_path: Path, table: list[str]
) -> None:
    gpus(2)
    make_plan(tmp_path / "a.plan", ranks=2, size=1024)
    before = free_memory("cuda")
    outcome = run_case(case, tmp_path / "a.plan", ranks=2, device="cuda", timeout=8)
    after = free_memory("cuda")
    table.append(f"{case}: {outcome.seconds:.1f} s until the last process ended")
    assert not outcome.wrong, outcome
    assert all(a >= b - FREE for a, b in zip(after, before)), (before, after)
