"""The standard's own test suite on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LEAST = 1750
"""Node tests that must pass without the fallback; onnx has 1,884."""


def test_enough_of_the_standards_tests_pass(gpus: Any, tmp_path: Path) -> None:
    gpus(1)
    out = tmp_path / "row.json"
    command = [sys.executable, "-W", "ignore", "-m", "onnxmesh.backend", "--device", "CUDA", "--json", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ONNXMESH_TUNE": "0"}
    subprocess.run([*command, "--processes", str(min(16, os.cpu_count() or 1))], env=environment, check=True)
    row = json.loads(out.read_text())
    node = row["kinds"]["node"]
    assert node["native"] + node["hosted"] + node["folded"] >= LEAST, row["exceptions"]
