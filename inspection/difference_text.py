"""The difference of two plans as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxmesh.inspection.difference import Change, Difference
from onnxmesh.runtime.text import micros, size, table

LONGEST = 20
"""Rows of a table, unless all are asked for."""
_TIMES = ("predicted time", "kernels", "sending", "of it beside kernels")
_SIZES = ("memory on a GPU", "weights", "activations")


def difference_text(found: Difference, first: str, second: str, *, full: bool = False) -> str:
    """Tables of what differs, the first plan's column before the second's; one line where nothing does."""
    if not found:
        return f"{first} and {second} do the same"
    names = [first, second]
    parts = [
        _part("Setting", found.setting, names, full),
        _part("One rank", {name: _figures(name, change) for name, change in found.totals.items()}, names, full),
        _part("Placements", found.placements, names, full),
        _part("Attention", found.strategies, names, full),
        _part("Sent", {name: _sent(change) for name, change in found.collectives.items()}, names, full),
        _part("Computed whole by every rank", found.replicated, names, full),
        _part("Instructions", found.kernels, names, full),
    ]
    told = [part for part in parts if part]
    return "\n\n".join(told or [f"{first} and {second} differ in the order or the details of their instructions alone"])


def _part(title: str, changes: Mapping[str, Any], names: list[str], full: bool) -> str:
    if not changes:
        return ""
    rows = [[name, *("-" if value is None else value for value in change)] for name, change in changes.items()]
    header = ["", *names, *[""] * (max(map(len, rows)) - 3)]
    return f"{title}\n{table(header, rows, limit=None if full else LONGEST)}"


def _figures(name: str, change: Change) -> tuple[str, str, str]:
    show = micros if name in _TIMES else size if name in _SIZES else "{:,.0f}".format
    texts = ["-" if value is None else show(value) for value in change]
    first, second = change
    ratio = f"x {second / first:.2f}" if first and second else ""
    return texts[0], texts[1], ratio


def _sent(change: Change) -> tuple[str, str]:
    texts = ["-" if value is None else f"{value[0]} x, {size(value[1])}" for value in change]
    return texts[0], texts[1]
