"""Tables for a paper, as plain text in Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "–": "--", "−": r"$-$",
    "×": r"$\times$",
}  # fmt: skip


@dataclass(frozen=True)
class Printed:
    """A table of plain text, before formatting.

    Attributes:
        title: Its heading.
        caption: What it shows, and under which protocol.
        head: Names of its columns; the first two contain text.
        rows: Rows; those with the same first column are consecutive.
        bold: Rows and columns of the best values.
    """

    title: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()


def markdown_table(table: Printed) -> str:
    """Format a table with its heading and caption."""

    def line(words: tuple[str, ...]) -> str:
        return "| " + " | ".join(word.replace("|", r"\|") for word in words) + " |"

    rows = [
        tuple(f"**{word}**" if (number, column) in table.bold else word for column, word in enumerate(row))
        for number, row in enumerate(table.rows)
    ]
    lines = [line(table.head), line(("---",) * len(table.head)), *map(line, rows)]
    return "\n\n".join([f"### {table.title}", table.caption, "\n".join(lines)])


def latex_file(tables: Iterable[Printed]) -> str:
    """Format every table as a `table*`; the document must load booktabs."""
    return "\n\n".join(["% Needs \\usepackage{booktabs}.", *map(_latex_table, tables)]) + "\n"


def escape_latex(words: str) -> str:
    """Escape text for LaTeX."""
    return re.sub("[" + re.escape("".join(_TEX)) + "]", lambda found: _TEX[found[0]], words)


def _latex_table(table: Printed) -> str:
    body: list[str] = []
    last: str | None = None
    for number, row in enumerate(table.rows):
        if last not in (None, row[0]):
            body.append(r"\midrule")
        words = [escape_latex(word) for word in ("" if row[0] == last else row[0], *row[1:])]
        words = [rf"\textbf{{{w}}}" if (number, column) in table.bold else w for column, w in enumerate(words)]
        body.append(rf"{' & '.join(words)} \\")
        last = row[0]
    head = " & ".join(map(escape_latex, table.head))
    return "\n".join([
        r"\begin{table*}", r"\centering", rf"\caption{{{escape_latex(f'{table.title}. {table.caption}')}}}",
        r"\scriptsize", r"\setlength{\tabcolsep}{2.5pt}",
        rf"\begin{{tabular}}{{@{{}}ll{'c' * (len(table.head) - 2)}@{{}}}}", r"\toprule", rf"{head} \\", r"\midrule",
         *body, r"\bottomrule", r"\end{tabular}", r"\end{table*}",
    ])  # fmt: skip
