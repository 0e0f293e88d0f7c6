"""Each collective, dtype and reduce op on 2 and 4 GPUs against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest

GROUPS: dict[int, list[tuple[dict[str, int], str]]] = {
    1: [({"tp": 1}, "tp")],
    2: [({"tp": 2}, "tp")],
    4: [({"cp": 4}, "cp"), ({"tp": 2, "cp": 2}, "tp"), ({"tp": 2, "cp": 2}, "cp")],
}


@pytest.mark.parametrize("ranks", GROUPS)
def test_collectives(ranks: int, gpus: Any, table: list[str], tmp_path: Path) -> None:
    gpus(ranks)
    entries = [
        {"key": f"{axis}-{'-'.join(f'{k}{v}' for k, v in mesh.items())}", "mesh": mesh, "axis": axis}
        for mesh, axis in GROUPS[ranks]
    ]
    results = jobs.run("collectives", ranks, entries, tmp_path)
    wrong = [text for result in results.values() for text in result.get("wrong", [result.get("error")])]
    count = sum(result.get("count", 0) for result in results.values())
    table.append(f"collectives, {ranks} GPUs: {count} checks a rank, {len(wrong)} wrong")
    assert not wrong, "\n".join(map(str, wrong[:20]))
