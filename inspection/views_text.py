"""The views of a plan as text for people: tables as wide as the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from onnxmesh.inspection import views
from onnxmesh.inspection.joined import Joined
from onnxmesh.runtime.loose import dims
from onnxmesh.runtime.text import columns, micros, percent, size, table

ROWS = 20
"""Rows of a table, unless all are asked for."""
Record = Mapping[str, Any]
Records = Sequence[Record]


def view_text(plan: Joined, what: str, *, full: bool = False) -> str:
    """A view; `full` cuts no table short."""
    limit = None if full else ROWS
    return _TEXTS[what](plan, limit)


def title(text: str, body: str) -> str:
    """A table under its title; nothing of an empty one."""
    return f"{text}\n{body}" if body else ""


def together(*parts: str) -> str:
    """The parts that say something, an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def grouped(entries: Iterable[Record], *names: str) -> list[tuple[Record, list[Record]]]:
    """Entries that are equal in these fields: the first of them, and all."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for entry in entries:
        groups[str([entry[name] for name in names])].append(entry)
    return [(some[0], some) for some in groups.values()]


def total(entries: Iterable[Record], name: str) -> float:
    """The sum of a field."""
    return float(sum(entry[name] or 0 for entry in entries))


def placed(entry: Record) -> str:
    """`tp:S(0)`, of the axes that cut it; `R` where none does."""
    cuts = {axis: placement for axis, placement in entry.get("placement", {}).items() if placement != "R"}
    return " ".join(f"{axis}:{placement}" for axis, placement in cuts.items()) or "R"


def shaped(entry: Record, name: str = "shape") -> str:
    """`float32[1, 16]`, with ? for a dim that depends on data."""
    return f"{entry.get('dtype', '')}{dims(entry[name])}" if name in entry else "?"


def local(entry: Record) -> str:
    """A rank's piece; `whole` where it is all."""
    return "whole" if entry.get("shape") == entry["local_shape"] else str(dims(entry["local_shape"]))


def numbers(found: Sequence[int], most: int = 4) -> str:
    """`#3 #4 #9`: instructions."""
    return " ".join(f"#{at}" for at in found[:most]) + (f" +{len(found) - most}" if len(found) > most else "")


def _tensors(plan: Joined, limit: int | None) -> str:
    rows = [
        [
            entry["name"] or f"buffer {entry['buffer']}",
            shaped(entry),
            local(entry),
            size(entry["local_bytes"]),
            placed(entry),
            numbers(entry["made_by"], 1),
            numbers(entry["read_by"], 2),
        ]
        for entry in views.tensors(plan)
    ]
    header = ["tensor", "global", "a rank's", "bytes", "placement", "made by", "read by"]
    return title(f"{len(rows)} tensors", table(header, rows, limit=limit))


def _weights(plan: Joined, limit: int | None) -> str:
    entries = sorted(views.weights(plan), key=lambda entry: -entry["local_bytes"])
    rows = [
        [
            entry["name"],
            shaped(entry),
            local(entry),
            size(entry["local_bytes"]),
            placed(entry),
            numbers(entry["read_by"], 2),
        ]
        for entry in entries
    ]
    whole, ours = total(entries, "bytes"), total(entries, "local_bytes")
    heading = f"{len(rows)} weights, {size(ours)} a rank of {size(whole)}, the largest first"
    return title(heading, table(["weight", "global", "a rank's", "bytes", "placement", "read by"], rows, limit=limit))


def _collectives(plan: Joined, limit: int | None) -> str:
    entries = views.collectives(plan)
    if not entries:
        return "No collectives: the ranks send nothing"
    header = ["axis", "collective", "count", "bytes each", "bytes", "us", "tensor", "why"]
    rows = [
        [
            first["axis"],
            first["kind"],
            len(some),
            size(first["bytes"]),
            size(total(some, "bytes")),
            f"{total(some, 'microseconds'):.0f}",
            first["tensor"],
            first["reason"],
        ]
        for first, some in sorted(
            grouped(entries, "axis", "kind", "bytes", "reason"), key=lambda group: -total(group[1], "microseconds")
        )
    ]
    sent, spent = total(entries, "bytes"), total(entries, "microseconds")
    heading = f"{len(entries)} collectives: a rank sends {size(sent)}, predicted {micros(spent)}; the longest first"
    parts = [title(heading, table(header, rows, limit=limit))]
    if limit is None:
        each = [
            [f"#{e['instruction']}", e["axis"], e["kind"], size(e["bytes"]), f"{e['microseconds']:.0f}", e["tensor"]]
            + [numbers(e["made_by"], 1), numbers(e["read_by"], 1), e["reason"]]
            for e in entries
        ]
        names = ["", "axis", "collective", "bytes", "us", "tensor", "from", "to", "why"]
        parts.append(title("In the order of the program", table(names, each)))
    return together(*parts)


def _memory(plan: Joined, limit: int | None) -> str:
    found = views.memory(plan)
    rank, peak = found["rank"], found["peak"]
    held = [[name.removesuffix("_bytes"), size(value)] for name, value in rank.items()]
    rows = [
        [
            entry["name"] or f"buffer {entry['buffer']}",
            f"{entry['dtype']}{entry['local_shape']}",
            size(entry["bytes"]),
            percent(entry["bytes"] / max(1, peak["bytes"])),
            f"#{entry['first']} to #{entry['last']}",
        ]
        for entry in peak["alive"]
    ]
    at = plan.instructions[peak["instruction"]] if plan.instructions else {"kernel": "", "nodes": []}
    heading = (
        f"Alive at the peak, {size(peak['bytes'])} at #{peak['instruction']} {at['kernel']} ({', '.join(at['nodes'])})"
    )
    return together(
        title("One rank holds", table(["", ""], held)),
        title("Activations alive over the program", _curve(found["alive_bytes"])),
        title(heading, table(["tensor", "a rank's", "bytes", "share", "alive"], rows, limit=limit)),
    )


_BLOCKS = " ▁▂▃▄▅▆▇█"


def _curve(held: Sequence[int]) -> str:
    """A line of blocks as high as what is alive, the most of each stretch of the program."""
    if not held or not max(held):
        return ""
    width = min(len(held), columns() - 4)
    edges = [len(held) * step // width for step in range(width + 1)]
    most = [max(held[start:stop]) for start, stop in pairwise(edges)]
    line = "".join(_BLOCKS[-(-8 * value // max(held))] for value in most)
    return f"  {line}\n  {'#0':<{width - 8}}{'#' + str(len(held) - 1):>8}" if width > 12 else f"  {line}"


def _patterns(plan: Joined, limit: int | None) -> str:
    entries = views.patterns(plan)
    found = grouped((entry for entry in entries if entry["found"]), "pattern", "reason")
    missed = grouped((entry for entry in entries if not entry["found"]), "pattern", "reason")
    return together(
        title("Found", table(["pattern", "count", "node", "what"], [_pattern(*group) for group in found], limit=limit))
        if found
        else "No pattern was found",
        title(
            "Nearly found (onnxmesh explain CODE says more)",
            table(
                ["code", "pattern", "count", "node", "why not"],
                [[first.get("code", ""), *_pattern(first, some)] for first, some in missed],
                limit=limit,
            ),
        )
        if missed
        else "",
    )


def _pattern(first: Record, some: Records) -> list[Any]:
    return [first["pattern"], len(some), first["node"], first["reason"]]


def _passes(plan: Joined, limit: int | None) -> str:
    rows = [[entry["stage"], entry["did"]] for entry in views.passes(plan)]
    return f"{table(['stage', 'what it did'], rows)}\n\ncompile -v prints their seconds, compile --dump their graphs"


def _instructions(plan: Joined, limit: int | None) -> str:
    entries = plan.instructions
    spent = total(entries, "microseconds")
    kinds = sorted(grouped(entries, "kernel", "axis"), key=lambda group: -total(group[1], "microseconds"))
    rows = [
        [f"{first['kernel']} {first['axis']}".strip(), len(some), f"{total(some, 'microseconds'):.0f}"]
        + [percent(total(some, "microseconds") / spent if spent else 0)]
        for first, some in kinds
    ]
    by_kernel = title("By kernel", table(["kernel", "count", "us", "share"], rows, limit=limit))
    if limit is None:
        return together(by_kernel, title("In order", _each(entries)))
    slow = sorted(entries, key=lambda entry: -(entry["microseconds"] or 0))[:limit]
    return together(by_kernel, title("The slowest (--all: every one, in order)", _each(slow)))


def _each(entries: Records) -> str:
    rows = [
        [
            f"#{entry['instruction']}",
            f"{entry['kernel']} {entry['axis']}".strip(),
            "-" if entry["microseconds"] is None else f"{entry['microseconds']:.1f}",
            " ".join(f"{tensor['dtype']}{tensor['local_shape']}" for tensor in entry["writes"][:2]),
            entry["module"],
            ", ".join(entry["nodes"][:2]) + (f" +{len(entry['nodes']) - 2}" if len(entry["nodes"]) > 2 else ""),
        ]
        for entry in entries
    ]
    return table(["", "kernel", "us", "writes", "module", "nodes"], rows)


_TEXTS: Mapping[str, Callable[[Joined, int | None], str]] = {
    "tensors": _tensors,
    "collectives": _collectives,
    "memory": _memory,
    "weights": _weights,
    "patterns": _patterns,
    "passes": _passes,
    "instructions": _instructions,
}
