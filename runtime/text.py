"""Tables and quantities as text for people."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 100
"""Columns of text that goes to no terminal."""
NARROW = 12
"""No column gets narrower."""

Cell = object
_FIGURE = re.compile(r"-|(x )?[-+]?[\d.,]+(e[-+]\d+)?( (%|B|[KMGT]iB|us|ms|[KMGTP]?FLOP))?")


def columns() -> int:
    """How wide text may be: the terminal's columns, or WIDTH where there is none."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns) if sys.stdout.isatty() else WIDTH


def wrap(text: str) -> str:
    """A paragraph, its lines after the first indented."""
    return textwrap.fill(text, columns(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], *, limit: int | None = None) -> str:
    """Columns as wide as they need to be, figures to the right; coloured on a terminal.

    Too long a line: names are shortened in the middle, and the last column is wrapped.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    shown = cells if limit is None else cells[:limit]
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(header), header_style="bold")
    for name, *column in zip(header, *shown):
        figures = any(column) and all(not cell or _FIGURE.fullmatch(cell) for cell in column)
        grid.add_column(name, justify="right" if figures else "left", overflow="fold")
    for row in shown:
        grid.add_row(*map(_Name, row[:-1]), Text(row[-1]))
    console = Console(width=columns(), highlight=False)
    with console.capture() as captured:
        console.print(Padding(grid, (0, 0, 0, 2)))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    if len(shown) < len(cells):
        lines.append(f"  ... and {len(cells) - len(shown)} more")
    return "\n".join(lines)


class _Name:
    """A cell of one line, shortened to its column."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(len(self.text), NARROW), len(self.text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(_shorten(self.text, options.max_width), no_wrap=True)


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
