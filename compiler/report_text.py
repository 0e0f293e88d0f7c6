"""The report as text for people: tables of at most 100 columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from onnxmesh.runtime.loose import dims, is_loose
from onnxmesh.runtime.text import micros, percent, size, table, wrap

ROWS = 12
"""Rows of a long table that are shown unless everything is asked for."""

Report = Mapping[str, Any]


def report_text(report: Report, *, full: bool = False) -> str:
    """All sections that say something; `full` cuts no table short."""
    limit = None if full else ROWS
    sections = [
        _head(report),
        _axes(report),
        _memory(report),
        _time(report),
        _attention(report, limit),
        _sent(report, limit),
        _replicated(report, limit),
        _fallback(report, limit),
        _uneven(report, limit),
        _precision(report, limit),
        _patterns(report, limit),
    ]
    return "\n\n".join(section for section in sections if section)


def placements_text(report: Report, *, full: bool = False) -> str:
    """Where inputs, outputs and weights live."""
    limit = None if full else ROWS
    tables = (_tensors(title, report[title], limit) for title in ("inputs", "outputs", "weights"))
    return "\n\n".join(text for text in tables if text)


def _flops(count: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if count < 1000:
            return f"{count:.1f} {unit}FLOP"
        count /= 1000
    return f"{count:.1f} PFLOP"


def _section(title: str, body: str) -> str:
    return f"{title}\n{body}" if body else ""


def _head(report: Report) -> str:
    mesh = " x ".join(f"{axis}={ranks}" for axis, ranks in report["mesh"].items() if ranks > 1) or "one rank"
    model = report["model"]
    line = (
        f"Mesh {mesh}: {report['ranks']} ranks. The model: {model['nodes']} nodes, {_flops(model['flops'])}, "
        f"weights {size(model['weight_bytes'])}."
    )
    return "\n".join([wrap(line), *(wrap(warning(item)) for item in report["warnings"])])


def warning(item: Report) -> str:
    """A warning and its code."""
    return f"warning[{item['code']}]: {item['reason']}" if item["code"] else f"warning: {item['reason']}"


def _axes(report: Report) -> str:
    header = ["axis", "ranks", "FLOPs divided", "FLOPs a rank", "weights divided", "linear weights", "sent a rank"]
    rows = [
        [
            axis["axis"],
            axis["ranks"],
            percent(axis["flops_sharded"]),
            percent(axis["flops_per_rank"]),
            percent(axis["weight_bytes_sharded"]),
            percent(axis["linear_weight_bytes_sharded"]),
            f"{size(axis['bytes_sent'])} in {axis['collectives']}",
        ]
        for axis in report["axes"]
    ]
    return _section("Sharded, axis by axis", table(header, rows)) if rows else ""


def _memory(report: Report) -> str:
    rank = report["rank"]
    staging = f", and {size(rank['staging_bytes'])} more if NCCL sends" if rank["staging_bytes"] else ""
    rows = [
        ["weights", size(rank["weight_bytes"]), f"{percent(rank['weight_share'])} of the whole"],
        ["activations", size(rank["activation_bytes"]), "at the peak"],
        ["inputs", size(rank["input_bytes"]), ""],
        ["on a GPU", size(rank["device_bytes"]), f"with {size(rank['workspace_bytes'])} of scratch at most{staging}"],
        ["work", _flops(rank["flops"]), f"{percent(rank['flops_share'])} of the whole"],
    ]
    return _section("One rank holds and does", table(["", "", ""], rows))


def _time(report: Report) -> str:
    time = report["time"]
    hidden = f" ({micros(time['hidden_us'])} of it beside computation)" if time["hidden_us"] else ""
    return wrap(
        f"Predicted for one run ({time['device']}): {micros(time['total_us'])}, with {micros(time['compute_us'])} of "
        f"computation and {micros(time['communication_us'])} of communication{hidden}; on one device "
        f"{micros(time['one_device_us'])}"
    )


def _grouped(
    entries: Iterable[Report], key: Callable[[Report], tuple[Any, ...]]
) -> list[tuple[tuple[Any, ...], list[Report]]]:
    groups: dict[tuple[Any, ...], list[Report]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return list(groups.items())


def _count(entries: Sequence[Report], name: str = "node") -> str:
    """The first name, and how many others there are."""
    first = str(entries[0][name])
    return first if len(entries) == 1 else f"{first} (+{len(entries) - 1})"


def _attention(report: Report, limit: int | None) -> str:
    groups = _grouped(report["attention"], lambda a: (a["axis"], a["strategy"], tuple(a["q"]), tuple(a["k"])))
    rows = [
        [axis, strategy, len(some), list(q), list(k), " ".join(some[0]["placement"]), _count(some)]
        for (axis, strategy, q, k), some in groups
    ]
    header = ["axis", "strategy", "count", "q", "k", "q, k, v", "node"]
    return _section("Attention", table(header, rows, limit=limit)) if rows else ""


def _sent(report: Report, limit: int | None) -> str:
    groups = _grouped(report["collectives"], lambda c: (c["axis"], c["kind"], c["bytes"], c["reason"]))
    rows = [
        [axis, kind, len(some), size(sent), some[0]["tensor"], _count(some), reason]
        for (axis, kind, sent, reason), some in groups
    ]
    header = ["axis", "collective", "count", "bytes each", "tensor", "wanted by", "why"]
    return _section("Collectives (bytes that one rank sends)", table(header, rows, limit=limit)) if rows else ""


def _replicated(report: Report, limit: int | None) -> str:
    groups = _grouped(report["replicated"], lambda n: (n["axis"], n["reason"]))
    rows = [
        [
            axis,
            some[0]["code"],
            len(some),
            f"{_total(some, 'microseconds'):.1f}",
            percent(_total(some, "share")),
            _count(some),
        ]
        + [f"{reason}: {_ops(some)}"]
        for (axis, reason), some in sorted(groups, key=lambda g: -_total(g[1], "microseconds"))
    ]
    header = ["axis", "code", "count", "us", "share", "node", "why: ops"]
    return _section("Computed by every rank", table(header, rows, limit=limit)) if rows else ""


def _fallback(report: Report, limit: int | None) -> str:
    rows = [[op, len(some), _count(some)] for (op,), some in _grouped(report["fallback"], lambda n: (n["op"],))]
    title = "Computed by onnx.reference, on the host and slowly: there is no kernel"
    return _section(title, table(["op", "count", "node"], rows, limit=limit)) if rows else ""


def _total(entries: Sequence[Report], name: str) -> float:
    return sum(float(entry[name]) for entry in entries)


def _ops(entries: Sequence[Report]) -> str:
    """`Add 26, MatMul 13`, the costly ones first."""
    groups = _grouped(entries, lambda n: (n["op"],))
    groups.sort(key=lambda g: -_total(g[1], "microseconds"))
    return ", ".join(f"{op} {len(some)}" for (op,), some in groups)


def _uneven(report: Report, limit: int | None) -> str:
    groups = _grouped(report["uneven"], lambda u: (u["axis"], u["what"], u["reason"]))
    rows = [[axis, what, _count(some, "name"), reason] for (axis, what, reason), some in groups]
    return _section("Does not divide", table(["axis", "what", "name", "why"], rows, limit=limit)) if rows else ""


def _precision(report: Report, limit: int | None) -> str:
    kept = _grouped(report["precision"]["kept"], lambda k: (k["op"], k["reason"]))
    rows = [[op, _count(some), reason] for (op, reason), some in kept]
    title = f"Float32 where {report['precision']['asked']} is asked for"
    return _section(title, table(["op", "node", "why"], rows, limit=limit)) if rows else ""


def _patterns(report: Report, limit: int | None) -> str:
    found = _grouped((p for p in report["patterns"] if p["found"]), lambda p: (p["pattern"],))
    missed = _grouped((p for p in report["patterns"] if not p["found"]), lambda p: (p["pattern"], p["reason"]))
    lines = []
    if found:
        lines.append(wrap("Patterns found: " + ", ".join(f"{name} {len(some)}" for (name,), some in found)))
    if missed:
        rows = [[some[0]["code"], name, _count(some), reason] for (name, reason), some in missed]
        lines.append(
            _section("Patterns nearly found", table(["code", "pattern", "node", "why not"], rows, limit=limit))
        )
    return "\n\n".join(lines)


def _tensors(title: str, tensors: Sequence[Report], limit: int | None) -> str:
    rows = [
        [
            t["name"],
            f"{t['dtype']}{dims(t['shape']) if is_loose(t['dtype']) else t['shape']}",
            str(t["local_shape"]) if t["local_shape"] != t["shape"] else "whole",
            size(t["local_bytes"]),
            " ".join(f"{axis}:{placement}" for axis, placement in t["placement"].items()) or "R",
        ]
        for t in tensors
    ]
    header = ["name", "global", "a rank's", "bytes", "placement"]
    return _section(title.capitalize(), table(header, rows, limit=limit)) if rows else ""
