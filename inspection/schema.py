"""JSON Schemas (draft 2020-12) of what onnxmesh writes as JSON: docs/schemas.md."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

NAMES = ("plan", "report", "bench", "estimate", "diff")
"""plan.json, report.json, and the results of bench, estimate and diff with --json."""


def schema(name: str) -> dict[str, Any]:
    """The schema of one of `NAMES`, for the version that this onnxmesh writes.

    Raises:
        KeyError: there is none of that name.
    """
    if name not in NAMES:
        raise KeyError(f"no schema {name!r}: there are {', '.join(NAMES)}")
    found: dict[str, Any] = json.loads(files("onnxmesh.inspection").joinpath(f"schemas/{name}.json").read_text())
    return found
