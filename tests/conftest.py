"""Modules that tests share: `evaluate` and the fixtures' `inputs` are imported by their plain names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command import Command

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "fixtures")]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `onnxmesh` inside the test's process."""
    from command import make_command

    return make_command(capsys)
