"""Rows of a comparison, printed as a table and written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import rich.table
from rich.console import Console

from cfusion.files import write_json


@dataclass(frozen=True)
class Row:
    """One measurement of both sides.

    Attributes:
        case: What was measured.
        ours: This program's figure.
        theirs: The other side's figure, measured in the same run; none where it cannot do the case at all.
        unit: Unit of both figures.
    """

    case: str
    ours: float
    theirs: float | None
    unit: str

    @property
    def ratio(self) -> float | None:
        """`ours / theirs`."""
        return None if not self.theirs else self.ours / self.theirs


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    table = rich.table.Table(title=title)
    for column in ("case", "ours", "theirs", "ratio", "unit"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    for row in rows:
        table.add_row(row.case, _number(row.ours), _number(row.theirs), _number(row.ratio), row.unit)
    Console().print(table)


def save(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON list of `{case, ours, theirs, ratio, unit}`."""
    write_json(path, [{**asdict(row), "ratio": row.ratio} for row in rows])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
