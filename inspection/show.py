"""What `onnxmesh inspect PLAN` prints: the summary, one view, or one name; as text or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxmesh.compiler.report_text import placements_text, report_text
from onnxmesh.inspection.joined import Joined
from onnxmesh.inspection.lookup import look_up
from onnxmesh.inspection.lookup_text import lookup_text
from onnxmesh.inspection.summary import summary_text
from onnxmesh.inspection.views import VIEWS
from onnxmesh.inspection.views_text import view_text
from onnxmesh.runtime.serialize import load


def show(folder: str, *, what: str | None, node: str | None, as_json: bool, full: bool) -> str:
    """The text.

    Raises:
        PlanError: the plan cannot be read, or has no report.
        InvalidArgument: it has no such node or tensor.
    """
    plan = load(folder)
    if as_json and what is None and node is None:
        return json.dumps(dict(plan.report), indent=1, sort_keys=True)
    joined = Joined(plan)
    if node is not None:
        found: Any = look_up(joined, node)
        return json.dumps(found, indent=1) if as_json else lookup_text(found, full=full)
    if what is not None:
        return json.dumps(VIEWS[what](joined), indent=1) if as_json else view_text(joined, what, full=full)
    if full:
        return f"{report_text(joined.report, full=True)}\n\n{placements_text(joined.report, full=True)}"
    return summary_text(joined, Path(folder).name)
