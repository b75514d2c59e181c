"""Name every cell of a page's tables by its column, so that the style sheet can stack the cells on a phone."""

from __future__ import annotations

import re
from html import escape, unescape

from markupsafe import Markup

_TABLE = re.compile(r"<table.*?</table>", re.DOTALL)
_HEAD = re.compile(r"<th\b[^>]*>(.*?)</th>", re.DOTALL)
_ROW = re.compile(r"<tr\b.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<td\b(?P<attributes>[^>]*)>")
_SPAN = re.compile(r'colspan="(\d+)"')


def name_cells(page: str) -> Markup:
    """Add `data-column`, the words of the column's head, to each cell of the tables of our own, well-formed HTML."""
    return Markup(_TABLE.sub(lambda found: _named(found[0]), page))  # noqa: S704 - adds escaped attributes only


def _named(table: str) -> str:
    head, mark, body = table.partition("</thead>")
    names = [" ".join(unescape(re.sub(r"<[^>]*>", " ", words)).split()) for words in _HEAD.findall(head)]
    return head + mark + _ROW.sub(lambda row: _named_row(row[0], names), body)


def _named_row(row: str, names: list[str]) -> str:
    # A row may begin with cells of the head, as tables of pandas do.
    columns = iter(names[row.count("<th") :])

    def named(cell: re.Match[str]) -> str:
        name = next(columns, "")
        if span := _SPAN.search(cell["attributes"]):
            for _ in range(int(span[1]) - 1):
                next(columns, None)
        return f'<td data-column="{escape(name)}"{cell["attributes"]}>'

    return _CELL.sub(named, row)


__all__ = ["name_cells"]
