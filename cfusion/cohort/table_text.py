"""Split the text of a table into a header and rows of cells; a row that does not fit the header is refused."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

_SEPARATORS = ",\t;"
_DECLARED = re.compile(r"\"?sep=(.)\"?", re.IGNORECASE)
"""First line that names the separator for Excel."""


@dataclass(frozen=True)
class TableText:
    """A table as text.

    Attributes:
        names: Column names, as written without spaces around them; empty for a column without a name.
        rows: Cells of each row, as many as there are names; rows without any content are left out.
        numbers: Number of each row in an editor; the first line of the file is 1.
        separator: Character between the cells.
    """

    names: list[str]
    rows: list[list[str]]
    numbers: list[int]
    separator: str


def split_text(text: str) -> TableText:
    """Split text into a header and rows.

    Lines `#…` above the header (cBioPortal) and a line `sep=…` (Excel) are skipped. Without the latter, the separator
    is the comma, tab or semicolon that gives the header the most cells.

    Raises:
        ValueError: There is no header, quotes are not closed, a name stands twice, a column without a name has values,
            or a row has more or fewer cells than the header.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    skipped, separator = 0, None
    while skipped < len(lines) and (lines[skipped].startswith("#") or _DECLARED.fullmatch(lines[skipped].strip())):
        if declared := _DECLARED.fullmatch(lines[skipped].strip()):
            separator = declared[1]
        skipped += 1
    if skipped == len(lines) or not lines[skipped].strip():
        raise ValueError("there is no header")
    separator = separator or max(_SEPARATORS, key=lambda s: len(next(csv.reader([lines[skipped]], delimiter=s))))
    records = csv.reader(io.StringIO("\n".join(lines[skipped:])), delimiter=separator, strict=True)
    names = [name.strip() for name in next(records)]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"duplicate column names: {', '.join(twice)}")
    numbered = [(skipped + 2 + i, row) for i, row in enumerate(records) if any(cell.strip() for cell in row)]
    _check_widths(names, numbered)
    _check_nameless(names, numbered)
    return TableText(names, [row for _, row in numbered], [number for number, _ in numbered], separator)


def _check_widths(names: list[str], numbered: list[tuple[int, list[str]]]) -> None:
    wrong = [(number, row) for number, row in numbered if len(row) != len(names)]
    if not wrong:
        return
    number, row = wrong[0]
    found = f"row {number} has {len(row)} fields and the header has {len(names)}"
    if len(wrong) == len(numbered) and all(len(row) == len(names) + 1 for _, row in wrong):
        raise ValueError(
            "every row has one field more than the header, so the columns are unclear: name the first column or remove "
            "it (R: row.names = FALSE), or remove the separator at the end of each row"
        )
    raise ValueError(f"{found}: a cell is missing, or one contains the separator and lacks quotes")


def _check_nameless(names: list[str], numbered: list[tuple[int, list[str]]]) -> None:
    """Accept a first column without a name, the row numbers of pandas and R, and empty columns."""
    for column, name in enumerate(names):
        filled = next((number for number, row in numbered if row[column].strip()), None) if column else None
        if not name and filled is not None:
            raise ValueError(f"column {column + 1} has no name and row {filled} has a value in it")
