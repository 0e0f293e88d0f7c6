"""The page of a plan: one HTML file that needs nothing else, neither a network nor a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from onnxmesh.inspection.page_data import page_data
from onnxmesh.runtime.errors import InvalidArgument
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.serialize import load

LIBRARIES = ("d3.min.js", "dagre.min.js")
SCRIPTS = (
    "model.js",
    "place.js",
    "layout.js",
    "graph.js",
    "details.js",
    "tables.js",
    "memory.js",
    "overview.js",
    "main.js",
)
"""The page's scripts in the order in which they run. page_assets/THIRD_PARTY.md says where the first are from."""

BENCH_FIELDS = ("latency_us", "kernels", "per_rank", "mesh")


def write(plan: str, path: str, bench: str | None = None) -> str:
    """The command: write the page of the plan in a folder to a file, and say so.

    Raises:
        PlanError: the plan cannot be read.
        InvalidArgument: `bench` is not the file of a benchmark of the plan.
        OSError: a file cannot be read or written.
    """
    measured = read_bench(bench) if bench is not None else None
    size = write_page(load(plan), path, Path(plan).resolve().name, measured)
    return f"{path}: {size / 1e6:.1f} MB; open it in a browser"


def write_page(plan: Plan, path: str | Path, title: str, bench: Mapping[str, Any] | None = None) -> int:
    """Write the page of a plan to a file; its bytes.

    Args:
        title: what the plan is called.
        bench: the result of a benchmark of it.

    Raises:
        InvalidArgument: the benchmark is of another mesh.
        OSError: the file cannot be written.
    """
    if bench is not None and bench["mesh"] != plan.mesh.to_json():
        raise InvalidArgument(
            f"the benchmark is of the mesh {bench['mesh']}, the plan of {plan.mesh.to_json()}",
            hint="give the result of `onnxmesh bench` on this plan",
            code="OM5014",
        )
    content = page(page_data(plan, title, bench)).encode()
    Path(path).write_bytes(content)
    return len(content)


def page(data: Mapping[str, Any]) -> str:
    """The HTML text of a page for what `page_data` made."""
    text = json.dumps(data, separators=(",", ":"))
    parts = {
        "style": _asset("page.css"),
        "libraries": "\n".join(map(_script, LIBRARIES)),
        "data": text.replace("<", "\\u003c"),
        "scripts": "\n".join(map(_script, SCRIPTS)),
    }
    result = _asset("page.html")
    for name, part in parts.items():
        head, mark, tail = result.partition(f"<!-- {name} -->")
        assert mark, name
        result = head + part + tail
    return result


def read_bench(path: str | Path) -> dict[str, Any]:
    """The result of a benchmark, as `onnxmesh bench --json` writes it.

    Raises:
        InvalidArgument: the file holds none.
        OSError: the file cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise InvalidArgument(f"{path} is not JSON: {error}", code="OM5015") from error
    if not isinstance(found, dict) or not all(name in found for name in BENCH_FIELDS):
        raise InvalidArgument(
            f"{path} is not the result of a benchmark", hint="onnxmesh bench PLAN --json FILE", code="OM5015"
        )
    return found


def _asset(name: str) -> str:
    return (resources.files("onnxmesh.inspection") / "page_assets" / name).read_text(encoding="utf-8")


def _script(name: str) -> str:
    text = _asset(name)
    assert "</script" not in text, name
    return f"<script>\n{text}\n</script>"
