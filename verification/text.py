"""What `onnxmesh verify --each` prints: how much was compared, how near to wrong it came, and the first difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxmesh.verification.each import Compared, Difference, Examination
from onnxmesh.verification.model import Model

ROWS = 5
"""Rows of each table."""


def examination(result: Examination, model: Model, saved: Path | None = None) -> RenderableType:
    """All that is to be said."""
    parts: list[RenderableType] = [_summary(result)]
    if result.differences:
        parts += [Text(), _wrong(result.differences), Text(), _first(result, model, saved)]
    elif result.compared:
        parts += [Text(), _nearest(result.compared)]
    return Group(*parts)


def _grid(rows: Iterator[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _summary(result: Examination) -> RenderableType:
    def rows() -> Iterator[tuple[str, str]]:
        names = {compared.name for compared in result.compared}
        yield "compared", f"{len(result.compared)} tensors, of {len(names)} values of the model"
        for reason, count in result.reasons.most_common():
            yield "not compared", f"{count} values: {reason}"
        used = ", ".join(f"{name} for {count}" for name, count in result.references.items())
        yield "reference", f"{used or 'none'}; float64 asked for {result.exact}"
        yield "wrong", f"{len(result.differences)} tensors"
        yield "time", f"{result.seconds:.2f} s"

    return _grid(rows())


def _table(title: str, columns: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns.items():
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def _nearest(compared: Sequence[Compared]) -> Table:
    """The tensors that came nearest to what is allowed."""
    table = _table(
        "Nearest to what rounding may do",
        {"tensor": "left", "node": "left", "placement": "left", "largest difference": "right", "of allowed": "right"},
    )
    for item in sorted(compared, key=lambda item: -item.worst)[:ROWS]:
        node = f"{item.node} ({item.op})" if item.node else item.op
        row = (item.name, node, _placement(item), f"{item.error:.1e}", f"{100 * item.worst:.0f} %")
        table.add_row(*map(Text, row))
    return table


def _wrong(differences: Sequence[Difference]) -> Table:
    """The first wrong tensors, in the order of the run."""
    more = f" (the first {ROWS} of {len(differences)})" if len(differences) > ROWS else ""
    columns = {"tensor": "left", "node": "left", "placement": "left", "rank": "right", "wrong elements": "right"}
    table = _table(f"Wrong tensors{more}", columns)
    for item in differences[:ROWS]:
        compared, ranks = item.compared, "+".join(map(str, item.ranks))
        row = (compared.name, f"{compared.node} ({compared.op})", _placement(compared), ranks, f"{compared.wrong:,}")
        table.add_row(*map(Text, row))
    return table


def _first(result: Examination, model: Model, saved: Path | None) -> RenderableType:
    first = result.differences[0]
    compared, segment = first.compared, first.check.segment

    def rows() -> Iterator[tuple[str, str]]:
        shares = f"ranks {', '.join(map(str, first.ranks))}, whose shares are added"
        yield "node", f"{compared.node} ({compared.op})"
        yield "tensor", f"{compared.name}: {compared.dtype}{list(compared.shape)}, {_placement(compared)}"
        if len(segment.nodes) > 1:
            nodes = [f"{model.label(number)} ({model.op(number)})" for number in segment.nodes]
            yield "nodes", f"{', '.join(nodes)}: all since {', '.join(segment.inputs)}"
        yield "rank", shares if len(first.ranks) > 1 else str(first.ranks[0])
        yield "element", f"{list(first.index)} of the tensor, {list(first.local_index)} of the rank's piece"
        yield "ours", value(first.ours)
        yield "reference", value(first.reference)
        yield "float64", "nothing computes it" if first.float64 is None else value(first.float64)
        yield "allowed", f"{first.allowed:.3g} from {'the reference' if first.float64 is None else 'float64'}"
        yield "made by", f"instruction {compared.instruction}, {compared.kernel}"
        for item in result.suspects[:ROWS]:
            yield (
                "suspect",
                (
                    f"instruction {item.instruction}, {item.kernel} of {item.node}, on rank {item.rank}: for the same "
                    f"inputs NumPy's kernel gives {item.wrong:,} other elements"
                ),
            )
        if saved is not None:
            yield "saved", f"{saved}: tensors.npz, nodes.onnx, difference.json"

    return Group(Text("The first difference", style="bold"), _grid(rows()))


def _placement(compared: Compared) -> str:
    return " ".join(f"{axis}:{placement}" for axis, placement in compared.placement.items()) or "whole on every rank"


def value(element: Any) -> str:
    """An element with all its digits."""
    return str(np.asarray(element)[()])
