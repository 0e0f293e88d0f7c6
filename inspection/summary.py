"""A plan on one screen: what it is, what it takes, what is sent, what is not divided, and what to look at next."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from onnxmesh.compiler.report_text import warning
from onnxmesh.inspection.joined import Joined
from onnxmesh.inspection.views_text import grouped, local, placed, shaped, together, total
from onnxmesh.runtime.text import columns, micros, percent, size, table, wrap

MOST = 3
"""Rows of a table."""
Record = Mapping[str, Any]


def summary_text(plan: Joined, name: str) -> str:
    """At most a screen."""
    report = plan.report
    return together(
        "\n".join([_head(report, name), _figures(report), *_warnings(report)]),
        _sent(report),
        _replicated(report),
        _ports(report),
        "\n".join(_more(report)),
    )


def _head(report: Record, name: str) -> str:
    mesh = " x ".join(f"{axis}={ranks}" for axis, ranks in report["mesh"].items() if ranks > 1) or "one rank"
    ways = dict.fromkeys(f"{a['strategy']} on {a['axis']}" for a in report["attention"])
    attention = f", attention by {', '.join(ways)}" if ways else ""
    precision = report["precision"]["asked"]
    asked = "" if precision == "model" else f", in {precision}"
    return wrap(f"{name}: {mesh}, {report['ranks']} ranks{attention}{asked} ({report['producer']})")


def _figures(report: Record) -> str:
    time, rank, model = report["time"], report["rank"], report["model"]
    alone, together = time["one_device_us"], time["total_us"]
    faster = f", {alone / together:.2f} times as long" if together else ""
    sent = sum(axis["bytes_sent"] for axis in report["axes"])
    hidden = f", {micros(time['hidden_us'])} of it beside kernels" if time["hidden_us"] else ""
    scratch = f"inputs {size(rank['input_bytes'])}, scratch {size(rank['workspace_bytes'])}"
    rows = [
        ["one run", micros(together), f"predicted, {time['device']}; one device {micros(alone)}{faster}"],
        ["  kernels", micros(time["compute_us"]), f"{rank['instructions']} instructions for {model['nodes']} nodes"],
        ["  sending", micros(time["communication_us"]), f"{size(sent)} a rank{hidden}"],
        ["memory", size(rank["device_bytes"]), "on each GPU"],
        ["  weights", size(rank["weight_bytes"]), f"{percent(rank['weight_share'])} of {size(model['weight_bytes'])}"],
        ["  activations", size(rank["activation_bytes"]), scratch],
        ["work", percent(rank["flops_share"]), "of the model's FLOPs on each rank"],
    ]
    return table(["", "", ""], rows)


def _warnings(report: Record) -> list[str]:
    fallen = len(report["fallback"])
    lines = [wrap(warning(item)) for item in report["warnings"][:MOST]]
    if fallen:
        lines.append(wrap(f"warning[OM2106]: {fallen} nodes are computed by onnx's reference implementation, slowly"))
    return lines


def _sent(report: Record) -> str:
    groups = grouped(report["collectives"], "axis", "kind", "bytes", "reason")
    groups.sort(key=lambda group: -total(group[1], "microseconds"))
    rows = [
        [first["axis"], first["kind"], len(some), size(first["bytes"]), f"{total(some, 'microseconds'):.0f}"]
        + [first["tensor"], first["reason"]]
        for first, some in groups
    ]
    header = ["sent", "", "count", "bytes each", "us", "tensor", "why"]
    return table(header, rows, limit=MOST) if rows else "Nothing is sent"


def _replicated(report: Record) -> str:
    groups = grouped(report["replicated"], "axis", "code", "reason")
    groups.sort(key=lambda group: -total(group[1], "microseconds"))
    rows = [
        [first["axis"], first["code"], len(some), f"{total(some, 'microseconds'):.0f}", percent(total(some, "share"))]
        + [textwrap.shorten(first["reason"], columns() - 40, placeholder=" ...")]
        for first, some in groups
    ]
    header = ["whole on", "", "nodes", "us", "share", "why every rank computes them"]
    return table(header, rows, limit=MOST) if rows else ""


def _ports(report: Record) -> str:
    rows = [
        [entry["name"], kind, shaped(entry), local(entry), placed(entry)]
        for kind, entries in (("input", report["inputs"]), ("output", report["outputs"]))
        for entry in entries
    ]
    return table(["name", "", "global", "a rank's", "placement"], rows, limit=MOST)


def _more(report: Record) -> list[str]:
    found = sum(entry["found"] for entry in report["patterns"])
    missed = len(report["patterns"]) - found
    uneven = f", {len(report['uneven'])} cuts are uneven" if report["uneven"] else ""
    return [
        wrap(f"{len(report['weights'])} weights, {found} patterns found, {missed} nearly{uneven}"),
        wrap("more: --what tensors|collectives|memory|weights|patterns|passes|instructions, --node NAME, --html"),
    ]
