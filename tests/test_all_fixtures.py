"""The program that runs all fixtures on GPUs, on the CPU: that it finds what is right, and what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

GPU = Path(__file__).parent / "gpu"
sys.path.insert(0, str(GPU))

import jobs  # noqa: E402
import plans  # noqa: E402
import references  # noqa: E402
from plans import Trial  # noqa: E402
from shares import Case, fixtures  # noqa: E402
from verdicts import Verdict, judge, summary  # noqa: E402

MLP = Trial("mlp_op18", Case(tp=2), "bf16")


def test_one_command_runs_every_precision(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--ranks", "1,2", "--only", "mlp_op18", "--json", str(tmp_path / "all.json")]
    done = subprocess.run(
        [sys.executable, str(GPU / "all_fixtures.py"), *arguments], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    assert {(item["ranks"], item["precision"]) for item in found} == {
        (ranks, precision) for ranks in (1, 2) for precision in ("fp32", "fp16", "bf16")
    }
    assert not any(item["failure"] for item in found)
    assert f"{len(found)} plans, 0 failed" in done.stdout


def test_every_float32_fixture_runs_in_all_precisions_and_others_in_their_own() -> None:
    trials = list(plans.trials())
    assert len({trial.key for trial in trials}) == len(trials)
    found = {name: {t.precision for t in trials if t.name == name} for name in fixtures.names()}
    assert found["t5_op18"] == {"fp32", "fp16", "bf16"}
    assert found["llama_bf16"] == {"bf16"}
    assert not Trial("llama_bf16", Case(), "bf16").converted


def result(tmp_path: Path, factor: float) -> dict[str, object]:
    """What a rank says of a run whose outputs are the reference times a factor."""
    file = tmp_path / f"{factor}.npz"
    expected = references.plain(tmp_path, MLP.name)
    np.savez(file, **{key: x * np.float32(factor) for key, x in expected.items()})
    some = {"captured": True, "reason": "", "generic": [], "differing": 0, "ready": 0.0, "first": 0.0, "again": 0.0}
    return {"file": str(file), **some}


@pytest.mark.parametrize(("factor", "fails"), [(1.0, False), (1.015, False), (1.1, True), (np.nan, True)])
def test_outputs_that_are_off_fail(tmp_path: Path, factor: float, fails: bool) -> None:
    plans.make(tmp_path, MLP)
    verdict = judge(MLP, result(tmp_path, factor), tmp_path, tmp_path)
    assert bool(verdict.failure) == fails
    assert (verdict.rounded is None) == (not fails)


def test_a_plan_that_misses_in_float16_fails_without_more_ado(tmp_path: Path) -> None:
    verdict = judge(Trial("mlp_op18", Case(tp=2), "fp16"), result(tmp_path, 1.03), tmp_path, tmp_path)
    assert verdict.failure and verdict.rounded is None


def test_rounded_weights_and_sensitivity_are_of_the_size_of_the_rounding(tmp_path: Path) -> None:
    folder = plans.make(tmp_path, MLP)
    assert folder is not None
    plan = plans.shares.plan_of(plans.shares.compile_fixture("mlp_op18", Case(tp=2), precision="bf16"))
    assert references.narrowed(plan, "bfloat16") and not references.narrowed(plan, "float16")
    plain, rounded = (
        references.plain(tmp_path, "mlp_op18"),
        references.rounded(tmp_path, "mlp_op18", plan, "bfloat16"),
    )
    assert 1e-4 < references.largest(rounded, plain)[0] < 2e-2
    assert 1e-4 < references.sensitivity(tmp_path, "mlp_op18", plan, "bfloat16") < 2e-2


def test_the_table_names_failures() -> None:
    good = Verdict("a-one", "a", 1, "fp32", error=1e-6, captured=True)
    bad = Verdict("b-tp2", "b", 2, "fp32", failure="the ranks ended")
    lines = summary([good, bad])
    assert "2 plans, 1 failed" in lines
    assert any("FAILED b-tp2" in line for line in lines)


def test_jobs_share_the_entries_and_one_that_fails_is_named(tmp_path: Path) -> None:
    entries = [
        {"key": f"{tp}", "name": "mlp_op18", "plan": str(plans.make(tmp_path, Trial("mlp_op18", Case(tp=tp), "fp32")))}
        for tp in (1, 2, 4)
    ]
    entries.append({"key": "lost", "name": "mlp_op18", "plan": str(tmp_path / "nowhere.plan")})
    found = jobs.run_beside("host", 1, entries, tmp_path / "out", ["0", "1"])
    assert set(found) == {"1", "2", "4", "lost"}
    assert "nowhere.plan" in found["lost"]["error"]
    assert all(Path(found[key]["file"]).exists() for key in ("1", "2", "4"))
    assert (tmp_path / "out" / "job1" / "job.json").exists()
