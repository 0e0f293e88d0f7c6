"""docs/microsoft.md names the ops of com.microsoft that are expanded, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from onnxmesh.passes.normalise.microsoft.generation import GENERATION
from onnxmesh.passes.normalise.microsoft.table import EXPANSIONS

PAGE = Path(__file__).parents[1] / "docs" / "microsoft.md"


def first_column(section: str) -> list[str]:
    """The ops in the first column of a section's table."""
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return [op for cell in cells for op in re.findall(r"`([A-Z]\w+)`", cell)]


def test_the_page_lists_what_is_supported() -> None:
    supported, _, refused = PAGE.read_text().partition("## What is refused")
    listed = first_column(supported)
    assert len(listed) == len(set(listed))
    assert set(listed) == {op for _, op in EXPANSIONS} - set(GENERATION)
    assert set(GENERATION) <= set(first_column(refused))
