"""Write the comparison of a sweep: one page, its tables as CSV, Markdown and LaTeX, its diagrams as SVG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cfusion.files import write_text
from cfusion.report.comparison import Comparison, Cost, Member
from cfusion.report.comparison_tables import (
    Grid,
    cells_table,
    latex,
    markdown,
    runs_table,
    tests_table,
)
from cfusion.report.critical_difference import cd_diagram
from cfusion.report.page import PROTOCOLS, report_environment
from cfusion.report.standalone import standalone
from cfusion.report.write import write_table


def write_comparison(comparison: Comparison, out: Path, *, title: str) -> Path:
    """Write the report of a sweep to a folder.

    `index.html` is the page, one file that needs no network and whose cells lead to their runs; `cells.csv` a row per
    cell with all its scores, `runs.csv` a row per run, `tests.csv` the paired tests; `table.md` and `table.tex` the
    table to print; `ranks_*.svg` the critical-difference diagrams.

    Args:
        comparison: What was compared.
        out: Folder, made where it is missing.
        title: Heading.

    Returns:
        The path of the page.
    """
    write_table(out / "cells.csv", cells_table(comparison))
    write_table(out / "runs.csv", runs_table(comparison))
    write_table(out / "tests.csv", comparison.tests)
    write_text(out / "table.md", markdown(comparison, title))
    write_text(out / "table.tex", latex(comparison))
    for (protocol, what), ranking in comparison.rankings.items():
        write_text(out / f"ranks_{what}_{protocol}.svg", standalone(cd_diagram(ranking, what)))
    write_text(out / "index.html", render_comparison(comparison, out, title))
    return out / "index.html"


def render_comparison(comparison: Comparison, out: Path, title: str) -> str:
    """The page as HTML; links to runs are relative to `out`."""
    environment = report_environment()
    environment.filters["hours"] = _hours
    members = [m for cell in comparison.cells for m in (*cell.members, *cell.permuted)]
    costs = [m.cost for m in members]
    figures = {
        f"{what}, protocol {protocol}": Markup(cd_diagram(ranking, what))  # noqa: S704 - the figure escapes its words
        for (protocol, what), ranking in comparison.rankings.items()
    }
    return environment.get_template("comparison.html.j2").render(
        title=title,
        grids=[Grid.of(comparison, protocol) for protocol in comparison.protocols],
        anchors={cell.key: f"cell-{number}" for number, cell in enumerate(comparison.cells)},
        cells=comparison.cells,
        tests=tests_table(comparison),
        figures=figures,
        failed=[m for m in members if m.state == "failed"],
        counts={state: sum(m.state == state for m in members) for state in ("done", "running", "failed", "open")},
        total=Cost.total(costs),
        protocols={p: PROTOCOLS.get(p, "") for p in comparison.protocols},
        nulls=any(cell.permuted for cell in comparison.cells),
        links=lambda member: _links(member, out),
        style=Markup(environment.get_template("style.css").render()),  # noqa: S704 - our own style sheet
    )


def _links(member: Member, out: Path) -> dict[str, str]:
    """What of a run's folder is there to look at, relative to the page."""
    names = {"folder": "", "report": "report/index.html", "predictions": "predictions.csv", "log": "run.log"}
    return {
        word: Path(os.path.relpath(member.folder / name, out)).as_posix()
        for word, name in names.items()
        if (member.folder / name).exists()
    }


def _hours(cost: Cost) -> str:
    """A cost in a few words."""
    parts: list[tuple[float, str]] = [(cost.gpu_hours, "GPU h"), (cost.cpu_hours, "CPU h"), (cost.energy_kwh, "kWh")]
    told: list[Any] = [f"{value:.3g} {unit}" for value, unit in parts if value > 0]
    return ", ".join(told) or "–"
