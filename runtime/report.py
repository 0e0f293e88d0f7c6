"""The report of a plan: JSON data (docs/report.md), and its lists as tables of pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxmesh.runtime.errors import InvalidArgument, RunError

if TYPE_CHECKING:
    from pandas import DataFrame


class Report(dict[str, Any]):
    """The report as a dict: it compares, copies and becomes JSON as one."""

    @property
    def tables(self) -> list[str]:
        """The names of what `to_pandas` takes: all lists of objects."""
        return [name for name, value in self.items() if isinstance(value, list)]

    def to_pandas(self, table: str = "weights") -> DataFrame:
        """A list of the report as a table; nested fields become columns such as `placement.tp`.

        Args:
            table: `weights`, `inputs`, `outputs`, `collectives`, `instructions`, `replicated`, ... (see `tables`).

        Raises:
            InvalidArgument: the report has no such list.
            RunError: pandas is not installed.
        """
        if table not in self.tables:
            known = ", ".join(self.tables) or "none"
            raise InvalidArgument(f"the report has no table {table!r}", hint=f"its tables are {known}", code="OM5013")
        try:
            import pandas
        except ImportError as error:
            raise RunError("tables of the report need pandas", hint="pip install pandas", code="OM5302") from error
        rows = self[table]
        if table == "instructions":
            times = self["time"]["instructions_us"]
            rows = [{"instruction": at, **row, "microseconds": times[at]} for at, row in enumerate(rows)]
        return pandas.json_normalize(rows)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(self[name])}" for name in self.tables if self[name])
        return f"<Report: {sizes}>" if sizes else "<Report: empty>"

    def _repr_html_(self) -> str:
        """For IPython."""
        rows = "".join(f"<tr><th>{name}</th><td>{len(self[name])}</td></tr>" for name in self.tables)
        return f"<table><caption>Report</caption>{rows}</table>"
