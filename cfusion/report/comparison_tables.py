"""The comparison as tables: CSV to compute with, Markdown to paste, LaTeX to print."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from cfusion.report.comparison import Cell, Comparison, Cost

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip

CAPTION = (
    "Harrell's C, mean ± standard deviation over folds and seeds. Bold: the best of a cohort; † not significantly "
    "different from it (paired patient bootstrap, Holm over all tests of the sweep, level .05). What is not done is "
    "named, and enters no mean."
)


@dataclass(frozen=True)
class Grid:
    """The cells of one protocol, as a paper prints them.

    Attributes:
        protocol: Of all its cells.
        cohorts: Columns.
        methods: Rows: encoder and model.
        cells: By encoder, model and cohort; missing where the sweep excludes it.
    """

    protocol: str
    cohorts: tuple[str, ...]
    methods: tuple[tuple[str, str], ...]
    cells: dict[tuple[str, str, str], Cell]

    @classmethod
    def of(cls, comparison: Comparison, protocol: str) -> Grid:
        """The grid of a protocol."""
        cells = comparison.of(protocol)
        return cls(
            protocol,
            tuple(dict.fromkeys(cell.cohort for cell in cells)),
            tuple(dict.fromkeys((cell.encoder, cell.model) for cell in cells)),
            {(cell.encoder, cell.model, cell.cohort): cell for cell in cells},
        )

    def row(self, encoder: str, model: str) -> list[Cell | None]:
        """A method's cells over the cohorts."""
        return [self.cells.get((encoder, model, cohort)) for cohort in self.cohorts]

    def mean(self, encoder: str, model: str) -> float:
        """A method's C, mean over the cohorts; NaN unless every cohort is complete."""
        values = [cell.value if cell is not None else math.nan for cell in self.row(encoder, model)]
        return sum(values) / len(values) if values else math.nan

    def cost(self, encoder: str, model: str) -> Cost:
        """What a method's runs cost over the cohorts."""
        return Cost.total([cell.cost for cell in self.row(encoder, model) if cell is not None])


def cells_table(comparison: Comparison) -> pd.DataFrame:
    """A row per cell: scores with intervals, null, test against the best, states and cost."""
    rows = []
    for cell in comparison.cells:
        scores = {} if cell.summary is None else {str(name): value for name, value in cell.summary.items()}
        rows.append({
            **scores,
            "cohort": cell.cohort, "encoder": cell.encoder, "model": cell.model, "protocol": cell.protocol,
            "complete": cell.complete, "runs": len(cell.members),
            "runs_done": sum(member.state == "done" for member in cell.members),
            "runs_failed": sum(member.state == "failed" for member in cell.members),
            "best": cell.best, "p_against_best": cell.p_best, "null_permuted": cell.null, **asdict(cell.cost),
        })  # fmt: skip
    return pd.DataFrame(rows)


def runs_table(comparison: Comparison) -> pd.DataFrame:
    """A row per run: where it stands, how it ended, what it cost."""
    members = [member for cell in comparison.cells for member in (*cell.members, *cell.permuted)]
    rows = [{**asdict(member), "folder": str(member.folder)} for member in members]
    return pd.DataFrame([{**row, **row.pop("cost")} for row in rows])


def markdown(comparison: Comparison, title: str) -> str:
    """One table a protocol."""
    parts = [f"# {title}", CAPTION]
    for protocol in comparison.protocols:
        grid = Grid.of(comparison, protocol)
        parts.append(f"## Protocol {protocol}")
        lines = [["encoder", "model", *grid.cohorts, "mean"], ["---"] * (len(grid.cohorts) + 3)]
        for encoder, model in grid.methods:
            texts = [_cell_text(cell, _bold_markdown, " ± ", "†") for cell in grid.row(encoder, model)]
            lines.append([encoder, model, *texts, _number(grid.mean(encoder, model))])
        parts.append("\n".join("| " + " | ".join(_escape_markdown(word) for word in line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def latex(comparison: Comparison) -> str:
    """One `table*` a protocol; the document loads booktabs."""
    parts = ["% Needs \\usepackage{booktabs}."]
    for protocol in comparison.protocols:
        grid = Grid.of(comparison, protocol)
        head = " & ".join(escape_latex(word) for word in ("Encoder", "Model", *grid.cohorts, "Mean"))
        body: list[str] = []
        last: str | None = None
        for encoder, model in grid.methods:
            texts = [_cell_text(cell, _bold_latex, r" $\pm$ ", r"$^\dagger$") for cell in grid.row(encoder, model)]
            name = "" if encoder == last else escape_latex(encoder)
            if last not in (None, encoder):
                body.append(r"\midrule")
            line = " & ".join([name, escape_latex(model), *texts, _number(grid.mean(encoder, model))])
            body.append(rf"{line} \\")
            last = encoder
        caption = escape_latex(f"{CAPTION} Protocol: {protocol}.").replace("±", r"$\pm$").replace("†", r"$^\dagger$")
        parts.append("\n".join([
            r"\begin{table*}", r"\centering", rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{ll{'c' * len(grid.cohorts)}c}}", r"\toprule", rf"{head} \\", r"\midrule",
            *body, r"\bottomrule", r"\end{tabular}", r"\end{table*}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def escape_latex(words: str) -> str:
    """The words as LaTeX prints them."""
    return re.sub(r"[\\&%$#_{}~^]", lambda found: _TEX[found[0]], words)


def _cell_text(cell: Cell | None, bold: Callable[[str], str], plus_minus: str, dagger: str) -> str:
    if cell is None:
        return "–"
    if not cell.complete or cell.summary is None:
        return cell.states or "–"
    text = f"{cell.value:.3f}{plus_minus}{cell.summary['cindex_std']:.3f}"
    return bold(text) if cell.best else text + dagger if cell.tied else text


def _bold_markdown(text: str) -> str:
    return f"**{text}**"


def _bold_latex(text: str) -> str:
    return rf"\textbf{{{text}}}"


def _escape_markdown(word: str) -> str:
    return word.replace("|", r"\|")


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def tests_table(comparison: Comparison) -> list[dict[str, Any]]:
    """The tests as rows, the nearest to the best first within a cohort."""
    if comparison.tests.empty:
        return []
    by = ["cohort", "protocol", "difference"]
    table = comparison.tests.sort_values(by, ascending=[True, True, False])
    return [dict(zip(table.columns, row, strict=True)) for row in table.itertuples(index=False)]
