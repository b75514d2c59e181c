"""Writes the comparison of a sweep: one page; tables as CSV, Markdown and LaTeX; diagrams as SVG."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from cfusion.files import write_text
from cfusion.report.comparison.cells import RANKED, ComparedRun, Comparison, Cost
from cfusion.report.comparison.comparison_tables import ResultGrid, cells_table, runs_table, tests_table
from cfusion.report.comparison.critical_difference import cd_diagram, rank_words, verdict
from cfusion.report.comparison.paper import latex, markdown
from cfusion.report.comparison.published_results import (
    PUBLISHED,
    PublishedComparison,
    PublishedTable,
    compare_published,
)
from cfusion.report.context import PROTOCOL_TEXTS, endpoint_words
from cfusion.report.report_files import write_table
from cfusion.report.run_page import report_environment
from cfusion.report.standalone import standalone
from cfusion.run_folder import PREDICTIONS, REPORT


def write_comparison(comparison: Comparison, out: Path, *, title: str, published: PublishedTable | None = None) -> Path:
    """Write the report of a sweep to a folder.

    Files: `index.html`, the page, a single file that needs no network and links to the runs; `cells.csv`, a row per
    cell with all scores; `runs.csv`, a row per run; `tests.csv`, the paired tests; `table.md` and `table.tex`, the
    tables for a paper; `ranks_*.svg`, the critical-difference diagrams; `published.csv`, the cells next to published
    results.

    Args:
        comparison: The comparison.
        out: Output folder, created if missing.
        title: Heading.
        published: Published results to set next to the cells; None: none.

    Returns:
        The path of the page.

    Raises:
        DataError: None of the published results belongs to a cell.
    """
    found = None if published is None else compare_published(comparison, published)
    write_table(out / "cells.csv", cells_table(comparison))
    write_table(out / "runs.csv", runs_table(comparison))
    write_table(out / "tests.csv", comparison.tests)
    write_text(out / "table.md", markdown(comparison, title, found))
    write_text(out / "table.tex", latex(comparison, found))
    _write_diagrams(comparison, out)
    if found is None:
        (out / PUBLISHED).unlink(missing_ok=True)
    else:
        write_table(out / PUBLISHED, found.rows)
    write_text(out / "index.html", render_comparison(comparison, out, title, found))
    return out / "index.html"


def _write_diagrams(comparison: Comparison, out: Path) -> None:
    """Write a diagram per ranking, and remove diagrams of an earlier report that this one does not have."""
    for what, protocol in itertools.product(RANKED, PROTOCOL_TEXTS):
        path = out / f"ranks_{what}_{protocol}.svg"
        ranking = comparison.rankings.get((protocol, what))
        if ranking is None:
            path.unlink(missing_ok=True)
        else:
            write_text(path, standalone(cd_diagram(ranking, what, protocol)))


def render_comparison(
    comparison: Comparison, out: Path, title: str, published: PublishedComparison | None = None
) -> str:
    """Render the page as HTML; links to runs are relative to `out`."""
    environment = report_environment()
    members = [m for cell in comparison.cells for m in (*cell.members, *cell.permuted)]
    costs, tests = [m.cost for m in members], tests_table(comparison)
    figures = {
        f"{what}, protocol {protocol}": (
            Markup(cd_diagram(ranking, what, protocol)),  # noqa: S704 - the figure escapes its words
            rank_words(ranking),
            verdict(ranking) if ranking.blocks == 1 else "",
        )
        for (protocol, what), ranking in comparison.rankings.items()
    }
    return environment.get_template("comparison.html.j2").render(
        title=title,
        grids=[ResultGrid.of(comparison, protocol) for protocol in comparison.protocols],
        anchors={cell.key: f"cell-{number}" for number, cell in enumerate(comparison.cells)},
        cells=comparison.cells,
        tests=tests,
        tested=sum(not row["why"] for row in tests),
        figures=figures,
        failed=[m for m in members if m.state == "failed"],
        counts={state: sum(m.state == state for m in members) for state in ("done", "running", "failed", "open")},
        total=Cost.total(costs),
        endpoints=_endpoints(members),
        searches={member.name: member.search for member in members if member.search},
        protocols={p: PROTOCOL_TEXTS[p] for p in comparison.protocols},
        published=published,
        nulls=any(cell.permuted for cell in comparison.cells),
        clinical=any(cell.clinical != "–" for cell in comparison.cells),
        links=lambda member: _links(member, out),
        style=Markup(environment.get_template("style.css").render()),  # noqa: S704 - our own style sheet
    )


def _endpoints(members: Sequence[ComparedRun]) -> str:
    """Return the end point of each cohort in words, once if all have the same."""
    by_cohort: dict[str, list[str]] = {}
    for member in members:
        by_cohort.setdefault(member.cohort, []).append(endpoint_words(member.endpoint))
    words = {cohort: " and ".join(dict.fromkeys(found)) for cohort, found in by_cohort.items()}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{cohort}: {endpoint}" for cohort, endpoint in words.items())


def _links(member: ComparedRun, out: Path) -> dict[str, str]:
    """Return the links to a run's existing files, relative to the page."""
    names = {"folder": "", "report": f"{REPORT}/index.html", "predictions": PREDICTIONS, "log": "run.log"}
    return {
        word: Path(os.path.relpath(member.folder / name, out)).as_posix()
        for word, name in names.items()
        if (member.folder / name).exists()
    }
