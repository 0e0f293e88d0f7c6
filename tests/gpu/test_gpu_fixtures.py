"""Every fixture on 1, 2 and 4 GPUs, launched and from a CUDA graph, against the whole model on the CPU."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jobs
import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16)
import numpy as np
import plans
import pytest
from shares import TOLERANCE, Case, fixtures, relative_error

from onnxmesh.compiler.verification import reference

PAIRS = [
    pytest.param(name, case, id=f"{name}-{case.name.replace(' ', '-') or 'one'}")
    for ranks in (1, 2, 4)
    for name, case in plans.cases(ranks)
]
ERRORS: dict[int, list[tuple[float, str, str]]] = {}


@cache
def expected(name: str, seed: int) -> dict[str, np.ndarray]:
    """The outputs of the whole model."""
    fixture = fixtures.load(name)
    return reference(fixture.path, fixture.make_inputs(seed))[1]


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, table: list[str]
) -> Iterator[Callable[[int], tuple[dict[str, Any], Path]]]:
    """What the ranks made of all plans that are asked for, by the number of ranks: run together, once."""
    wanted = [item.callspec.params for item in request.session.items if item.module is request.module]  # type: ignore[attr-defined]
    base = plans.base(tmp_path_factory.mktemp("plans"))

    @cache
    def of(ranks: int) -> tuple[dict[str, Any], Path]:
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        entries = []
        for params in wanted:
            name, case = params["name"], params["case"]
            if case.mesh.size == ranks and (folder := plans.make(base, name, case)):
                entries.append({"key": folder.stem, "name": name, "plan": str(folder)})
        found = jobs.run("plans", ranks, entries, out)
        return found, out

    yield of
    for ranks in sorted(ERRORS):
        table.extend(summary(ranks, *of(ranks)))


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_a_fixture(name: str, case: Case, gpus: Any, results: Any) -> None:
    gpus(case.mesh.size)
    found, out = results(case.mesh.size)
    key = plans.folder_of(Path(), name, case).stem
    if key not in found:
        pytest.skip("refused by the compiler")
    result = found[key]
    assert "error" not in result, result["error"]
    with np.load(out / f"{key}.npz") as file:
        for place, kind in result["kinds"].items():
            seed, output = place.split("/", 1)
            want = expected(name, int(seed))[output]
            error = relative_error(file[place].view(kind).reshape(want.shape), want)
            ERRORS.setdefault(case.mesh.size, []).append((error, fixtures.load(name).dtype, key))
            assert error <= TOLERANCE[fixtures.load(name).dtype], f"{output}, inputs {seed}"


def summary(ranks: int, found: dict[str, Any], out: Path) -> list[str]:
    """A few lines about one number of ranks."""
    good = [result for result in found.values() if "error" not in result]
    lines = [f"{ranks} GPUs: {len(found)} plans, {len(found) - len(good)} failed"]
    for dtype in sorted({dtype for _, dtype, _ in ERRORS[ranks]}):
        error, _, key = max((e for e in ERRORS[ranks] if e[1] == dtype), key=lambda e: (e[0] == e[0], e[0]))
        lines.append(f"  {dtype}: largest relative error {error:.1e} ({key})")
    for captured in (True, False):
        some = [result for result in good if result["captured"] == captured]
        if some:
            again = statistics.median(result["again"] for result in some)
            how = "in one CUDA graph" if captured else "launched one by one"
            lines.append(f"  {len(some)} {how}: median {1000 * again:.2f} ms a run")
    moving = sum(result["differing"] > 0 for result in good)
    lines.append(f"  {moving} plans whose outputs differ in some bit from run to run")
    reasons = Counter(result["reason"].split(" of node")[0][:60] for result in good if not result["captured"])
    return lines + [f"  not captured: {count} x {reason}" for reason, count in reasons.most_common(6)]
