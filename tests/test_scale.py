"""A compile without weights takes little time and memory, however wide the model; the full sizes are in benchmarks/."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["scale"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scale = load_benchmark()


@pytest.mark.parametrize("job", [scale.Job("flux", tp=8, layers=2), scale.Job("llama-70b", tp=2, cp=4, layers=2)])
def test_two_blocks_without_weights(job: object, tmp_path: Path) -> None:
    """Gigabytes of weights, none of which is touched."""
    scale.write_model(job, tmp_path)
    figures = scale.measure(job, tmp_path)
    assert figures.memory <= 1.0
    assert figures.seconds <= 60.0


def test_the_largest_tensor_bounds_the_memory_of_a_compile_with_weights(tmp_path: Path) -> None:
    """Two blocks of 8 GiB's width, embedding and output: 1.7 GiB, of which the largest tensor is 0.34."""
    job = scale.Job("eight-gib", tp=4, weights=True, layers=2)
    scale.write_model(job, tmp_path)
    assert (tmp_path / "eight-gib.onnx.data").stat().st_size > 1.5 * scale.GIB
    assert scale.measure(job, tmp_path).memory <= 1.0
