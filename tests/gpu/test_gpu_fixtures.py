"""Every fixture on 1, 2 and 4 GPUs in every precision, launched and from a CUDA graph, against the whole model.

`python tests/gpu/all_fixtures.py` does the same without pytest, for any part of them.
"""

from __future__ import annotations

from typing import Any

import all_fixtures
import jobs
import plans
import pytest
from plans import Trial
from verdicts import Verdict, summary

PARAMS = [pytest.param(trial, id=trial.key) for trial in plans.trials()]


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, table: list[str]
) -> dict[str, Verdict]:
    """What came of all plans that are asked for and that there are GPUs for: run together, once."""
    gpus = jobs.gpus()
    wanted = [item.callspec.params["trial"] for item in request.session.items if item.module is request.module]  # type: ignore[attr-defined]
    fitting = [trial for trial in wanted if trial.case.mesh.size <= len(gpus)]
    found = [item for some in all_fixtures.run(fitting, tmp_path_factory.mktemp("all"), gpus) for item in some]
    table.extend(summary(found))
    return {item.key: item for item in found}


@pytest.mark.parametrize("trial", PARAMS)
def test_a_fixture(trial: Trial, gpus: Any, request: pytest.FixtureRequest) -> None:
    gpus(trial.case.mesh.size)
    found: dict[str, Verdict] = request.getfixturevalue("verdicts")
    if trial.key not in found:
        pytest.skip("refused by the compiler")
    assert not found[trial.key].failure
