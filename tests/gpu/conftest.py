"""GPU tests: skipped where there are too few GPUs. Run them with `pytest tests/gpu -n 0`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

TABLE: list[str] = []
"""Lines for the end of the tests' output."""


@cache
def devices() -> int:
    """How many GPUs there are; 0 without CuPy or a driver."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception:
        return 0


@pytest.fixture(scope="session")
def gpus() -> Callable[[int], None]:
    """Skips the test unless there are so many GPUs."""

    def need(count: int) -> None:
        pytest.importorskip("cupy")
        if devices() < count:
            pytest.skip(f"needs {count} GPUs, there are {devices()}")

    return need


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of what ran on the GPUs."""
    for line in TABLE:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def table() -> list[str]:
    """Where tests add lines to the table."""
    return TABLE
