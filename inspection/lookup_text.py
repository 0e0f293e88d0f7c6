"""What a plan says of one name, as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxmesh.inspection.views_text import grouped, local, numbers, placed, shaped, title, together
from onnxmesh.runtime.text import size, table, wrap

ROWS = 12
"""Rows of a table, unless all are asked for."""
Record = Mapping[str, Any]


def lookup_text(found: Record, *, full: bool = False) -> str:
    """What it is, the instructions with shapes and placements, why it lies so, and what is sent around it."""
    limit = None if full else ROWS
    return together(
        f"{found['name']}: {_kind(found)}",
        _tensor(found),
        _instructions(found["instructions"], limit),
        _reads_and_writes(found, limit),
        _why(found, limit),
        _collectives(found["collectives"], limit),
        _said(found, limit),
    )


def _kind(found: Record) -> str:
    if found["is"] == "node":
        modules = dict.fromkeys(entry["module"] for entry in found["instructions"] if entry["module"])
        return f"a node of the model{', in ' + ', '.join(modules) if modules else ''}"
    return {"input": "an input", "output": "an output", "activation": "an activation", "weight": "a weight"}.get(
        found["is"], "an instruction"
    )


def _tensor(found: Record) -> str:
    entries = [found["weight"]] if "weight" in found else found.get("tensors", [])
    rows = [
        [shaped(entry), local(entry), size(entry["local_bytes"]), placed(entry)]
        + [numbers(entry.get("made_by", [])), numbers(entry["read_by"])]
        for entry in entries
    ]
    lines = [table(["global", "a rank's", "bytes", "placement", "made by", "read by"], rows)] if rows else []
    if names := [name for name in found.get("sources", []) if name != found["name"]]:
        lines.append(wrap(f"  from {', '.join(names)}"))
    return "\n".join(lines)


def _instructions(entries: Sequence[Record], limit: int | None) -> str:
    rows = [
        [
            f"#{entry['instruction']}",
            f"{entry['kernel']} {entry['axis']}".strip(),
            "-" if entry["microseconds"] is None else f"{entry['microseconds']:.1f}",
            numbers(entry["after"]),
            ", ".join(entry["nodes"]),
        ]
        for entry in entries
    ]
    return title("Instructions", table(["", "kernel", "us", "waits for", "nodes"], rows, limit=limit)) if rows else ""


def _reads_and_writes(found: Record, limit: int | None) -> str:
    if found["is"] not in ("node", "instruction"):
        return ""
    rows = [
        [f"#{entry['instruction']}", way, tensor["name"] or f"buffer {tensor['buffer']}"]
        + [shaped(tensor), local(tensor), placed(tensor) if "placement" in tensor else "?"]
        for entry in found["instructions"]
        for way in ("reads", "writes")
        for tensor in entry[way]
    ]
    return title("Tensors", table(["", "", "tensor", "global", "a rank's", "placement"], rows, limit=limit))


def _why(found: Record, limit: int | None) -> str:
    parts: dict[str, None] = {}
    for decision in found["decisions"]:
        rows = [
            [mark, way["factor"] + (f" ({way['expansion']})" if way["expansion"] else ""), way["placement"]]
            + [f"{way['computing_us']:.1f}", f"{way['moving_us']:.1f}", note]
            for mark, way, note in _ways(decision)
        ]
        alike = f", as {decision['count'] - 1} like it" if decision["count"] > 1 else ""
        heading = f"Why so on {decision['axis']}: {decision['op']}{alike} ({decision['considered']} ways considered)"
        why = wrap(f"  {decision['reason']}") if decision["reason"] else ""
        lines = table(["", "cut", "inputs -> outputs", "us itself", "us moving", ""], rows)
        parts["\n".join(part for part in (heading, why, lines) if part)] = None
    return together(*list(parts)[:limit])


def _ways(decision: Record) -> list[tuple[str, Record, str]]:
    others = [("", way, "" if way["allowed"] else "the axis does not allow it") for way in decision["alternatives"]]
    return [("*", decision["chosen"], "chosen"), *others]


def _collectives(entries: Sequence[Record], limit: int | None) -> str:
    rows = [
        [first["where"], first["axis"], first["kind"], len(some), size(first["bytes"])]
        + [f"{first['microseconds']:.0f}", first["tensor"], first["reason"]]
        for first, some in grouped(entries, "where", "axis", "kind", "bytes", "reason")
    ]
    header = ["", "axis", "collective", "count", "bytes each", "us each", "tensor", "why"]
    return title("Collectives around it", table(header, rows, limit=limit)) if rows else ""


def _said(found: Record, limit: int | None) -> str:
    rows = [
        [entry.get("code", ""), entry.get("axis", ""), section, entry.get("reason", "")]
        for section in ("replicated", "uneven", "patterns")
        for entry in found[section]
    ]
    rows += [["", entry["axis"], "attention", entry["strategy"]] for entry in found["attention"]]
    rows += [[entry["code"], "", "fallback", "onnx.reference computes it"] for entry in found["fallback"]]
    return title("The report says", table(["code", "axis", "", ""], rows, limit=limit)) if rows else ""
