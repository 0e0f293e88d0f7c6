"""Tables and quantities as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100
NARROW, WRAPPED = 12, 36
"""No column gets narrower than the first; the last one is wrapped from the second on."""

Cell = object


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], *, limit: int | None = None) -> str:
    """Columns as wide as they need to be. Too long a line: names are shortened, and the last column is wrapped."""
    cells = [[str(cell) for cell in row] for row in rows]
    shown = cells if limit is None else cells[:limit]
    widths = [max(map(len, column)) for column in zip(*([header] if any(header) else []), *shown)]
    while sum(widths) + 2 * len(widths) > WIDTH and max(widths) > NARROW:
        column = max(range(len(widths)), key=lambda i: (widths[i] > WRAPPED if i == len(widths) - 1 else 0, widths[i]))
        widths[column] -= 1
    lines = [line for row in ([header] if any(header) else []) + shown for line in _lines(row, widths)]
    if len(shown) < len(cells):
        lines.append(f"  ... and {len(cells) - len(shown)} more")
    return "\n".join(lines)


def _lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A row: its first line, and what the last column needs beyond it."""
    cells = [_shorten(cell, width).ljust(width) for cell, width in zip(row[:-1], widths)]
    first, *rest = textwrap.wrap(row[-1], widths[-1]) or [""]
    start = "  " + "".join(f"{cell}  " for cell in cells)
    return [(start + first).rstrip(), *(" " * len(start) + more for more in rest)]


def _shorten(text: str, width: int) -> str:
    """The two ends of a text that is too long: names differ at either."""
    if len(text) <= width:
        return text
    left = (width - 2) // 2
    return f"{text[:left]}..{text[len(text) - (width - 2 - left) :]}"


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def micros(value: float) -> str:
    """Microseconds as people read them."""
    return f"{value:.0f} us" if value < 10_000 else f"{value / 1000:.1f} ms"


def percent(part: float) -> str:
    """A share."""
    return f"{100 * part:.1f} %"
