"""What every benchmark shares: its options, and rows that are printed as a table and written as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
        better: Which figures are the better ones.
    """

    case: str
    ours: float
    theirs: float | None
    unit: str
    better: Literal["higher", "lower"] = "higher"

    @property
    def ratio(self) -> float | None:
        """How many times better ours is: above 1 where it wins, whichever way the unit counts."""
        if not self.theirs or not self.ours:
            return None
        return self.ours / self.theirs if self.better == "higher" else self.theirs / self.ours


def options(documentation: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that both sides run, settles nothing")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows here, as {case, ours, theirs, ratio, unit}"
    )
    return parser


def present(title: str, rows: Sequence[Row], json_file: Path | None) -> None:
    """Print the rows as a table; write them where a file is named."""
    table = rich.table.Table(title=title)
    for column in ("case", "ours", "theirs", "ratio", "unit"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    for row in rows:
        table.add_row(row.case, _number(row.ours), _number(row.theirs), _number(row.ratio), row.unit)
    Console().print(table)
    if json_file is not None:
        values = [{"case": r.case, "ours": r.ours, "theirs": r.theirs, "ratio": r.ratio, "unit": r.unit} for r in rows]
        write_json(json_file, values)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
