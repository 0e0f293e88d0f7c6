"""Modules that tests share: `evaluate` and the fixtures' `inputs` are imported by their plain names."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "fixtures")]
