"""Tables of the comparison for a paper, in Markdown and LaTeX."""

from __future__ import annotations

import math
from typing import Any

from cfusion.report.comparison.cells import RANKED, Cell, Comparison
from cfusion.report.comparison.comparison_tables import ResultGrid, tests_table
from cfusion.report.comparison.critical_difference import cohorts_of, verdict
from cfusion.report.comparison.published_results import PublishedComparison
from cfusion.report.context import PROTOCOL_TEXTS, named
from cfusion.report.number_words import bare_p, decimal, with_interval
from cfusion.report.printed_tables import Printed, latex_file, markdown_table

_RESULTS = (
    "Harrell's C, mean ± standard deviation over folds and seeds. Bold: the highest C within folds of a cohort; † not "
    "significantly different from it (paired patient bootstrap, Holm over all tests of the sweep, level .05); ‡ not "
    "tested against it. Unfinished runs are named and enter no mean. Hours: all cohorts, seeds and folds."
)
_COHORT = (
    "C within folds{clinical}, and the paired difference from the best, each with its 95% interval;{null} p corrected "
    "(Holm) over the {tested} tests of the sweep. The best was chosen on these same numbers, which is optimistic for "
    "it."
)
_PUBLISHED = (
    "Harrell's C, mean ± standard deviation over folds, here and as published. Difference: here minus published. "
    "Within sd: whether the published value is within the standard deviation here. Null: mean C of noise scores under "
    "their protocol on these folds, independent between epochs, and correlated. Clinical: mean C of the clinical "
    "covariates. A published result may come from other patients, slides, embeddings or settings."
)
_RANKS = "Mean ranks by C within folds, 1 is best; cohorts with a missing value are left out."


def printed(comparison: Comparison, protocol: str, published: PublishedComparison | None = None) -> list[Printed]:
    """Build a protocol's tables: results, each cohort with its tests, ranks over cohorts, and published results."""
    grid = ResultGrid.of(comparison, protocol)
    tests = tests_table(comparison)
    cohorts = [_cohort(grid, cohort, tests) for cohort in grid.cohorts]
    return [_results(grid), *cohorts, *_ranks(comparison, protocol), *_published(published, protocol)]


def markdown(comparison: Comparison, title: str, published: PublishedComparison | None = None) -> str:
    """Format a section per protocol, with the protocol's meaning."""
    parts = [f"# {title}"]
    for protocol in comparison.protocols:
        parts += [f"## Protocol {protocol}", PROTOCOL_TEXTS[protocol]]
        parts += [markdown_table(table) for table in printed(comparison, protocol, published)]
    return "\n\n".join(parts) + "\n"


def latex(comparison: Comparison, published: PublishedComparison | None = None) -> str:
    """Format every table as a `table*`; the document must load booktabs."""
    tables = [table for protocol in comparison.protocols for table in printed(comparison, protocol, published)]
    return latex_file(tables)


def _results(grid: ResultGrid) -> Printed:
    rows, bold = [], set()
    costs = {method: grid.cost(*method) for method in grid.methods}
    on_gpus = any(cost.gpu_hours > 0 for cost in costs.values())
    for number, (encoder, model) in enumerate(grid.methods):
        cells = grid.row(encoder, model)
        mean_text = decimal(grid.mean_of_folds(encoder, model))
        hours = costs[encoder, model].gpu_hours if on_gpus else costs[encoder, model].cpu_hours
        hours_text = "–" if math.isnan(hours) else f"{hours:,.1f}"
        rows.append((encoder, model, *map(_mean_and_sd, cells), mean_text, hours_text))
        bold |= {(number, 2 + place) for place, cell in enumerate(cells) if cell is not None and cell.best}
    head = ("Encoder", "Model", *grid.cohorts, "Mean", "GPU h" if on_gpus else "CPU h")
    return Printed("Results", f"{_RESULTS} {named(grid.protocol)}", head, tuple(rows), frozenset(bold))


def _mean_and_sd(cell: Cell | None) -> str:
    if cell is None or cell.summary is None or not cell.complete:
        return (cell.states if cell is not None else "") or "–"
    return f"{cell.mean_of_folds:.3f} ± {cell.spread:.3f}{cell.mark}"


def _cohort(grid: ResultGrid, cohort: str, tests: list[dict[str, Any]]) -> Printed:
    """Build the table of a cohort's methods with details that the table of results omits."""
    found = {row["model"]: row for row in tests if (row["cohort"], row["protocol"]) == (cohort, grid.protocol)}
    cells = [cell for cell in grid.cells.values() if cell.cohort == cohort]
    nulls = any(not math.isnan(cell.null) for cell in cells)
    clinical = grid.clinical(cohort)
    rows = []
    for cell in cells:
        null = ("–" if math.isnan(cell.null) else f"{cell.null:.3f}",) if nulls else ()
        within = cell.within if cell.complete else cell.states or "–"
        added = () if clinical == "–" else (cell.added,)
        rows.append(
            (cell.encoder, cell.model, within, *added, *null, *_test(cell, found.get(cell.label)), cell.cost.words)
        )
    null_head = ("Permuted",) if nulls else ()
    added_head = () if clinical == "–" else ("Adds to the clinic (95%)",)
    head = (
        "Encoder",
        "Model",
        "C within folds (95%)",
        *added_head,
        *null_head,
        "Difference (95%)",
        "p",
        "p, Holm",
        "Cost",
    )
    null_text = " permuted: the same model trained on permuted outcomes, C within folds;" if nulls else ""
    clinical_words = (
        ""
        if clinical == "–"
        else f", what the risk adds to the clinical covariates, which reach {clinical} by themselves"
    )
    caption = _COHORT.format(tested=sum(not row["why"] for row in tests), null=null_text, clinical=clinical_words)
    return Printed(f"Cohort {cohort}", f"{caption} {named(grid.protocol)}", head, tuple(rows))


def _test(cell: Cell, row: dict[str, Any] | None) -> tuple[str, str, str]:
    """Format the difference with its interval, p, and p after Holm."""
    if row is None or row["why"]:
        return "the best" if cell.best else row["why"] if row else "–", "–", "–"
    words = with_interval(row["difference"], row["low"], row["high"], sign="+")
    return words, bare_p(row["p"]), bare_p(row["p_holm"])


def _ranks(comparison: Comparison, protocol: str) -> list[Printed]:
    """Build one table of all rankings; none if there is no ranking."""
    found = [(what, comparison.rankings.get((protocol, what))) for what in RANKED]
    rankings = [(what, ranking) for what, ranking in found if ranking is not None]
    if not rankings:
        return []
    rows = [
        (f"{what}, {cohorts_of(ranking)}", name, f"{rank:.2f}")
        for what, ranking in rankings
        for name, rank in zip(ranking.names, ranking.mean_ranks, strict=True)
    ]
    verdicts = " ".join(f"{what.capitalize()}: {verdict(ranking)}" for what, ranking in rankings)
    head = ("Ranked", "Name", "Mean rank")
    return [Printed("Ranks over cohorts", f"{_RANKS} {verdicts} {named(protocol)}", head, tuple(rows))]


def _published(published: PublishedComparison | None, protocol: str) -> list[Printed]:
    """Build the table of the cells of a protocol next to published results; none if there is no such cell."""
    if published is None:
        return []
    found = published.matched[published.matched["protocol"] == protocol].to_dict("records")
    rows = tuple(
        (
            f"{row['cohort']}, {row['encoder']}", row["model"],
            _spread(row["cindex_mean"], row["cindex_std"]) if row["complete"] else "not complete",
            _spread(row["their_cindex_mean"], row["their_cindex_std"]), row["their_protocol"],
            decimal(row["difference"], 3, "+") if row["complete"] else "–",
            {True: "yes", False: "no"}.get(row["within_fold_sd"], "–"),
            decimal(row["null_independent"]), decimal(row["null_correlated"]), decimal(row["clinical_c_mean"]),
        )
        for row in found
    )  # fmt: skip
    head = (
        "Cohort, encoder", "Model", "Here", "Published", "Their protocol", "Difference", "Within sd", "Null",
        "Null, correlated", "Clinical",
    )  # fmt: skip
    caption = f"{_PUBLISHED} {named(protocol)}"
    return [Printed(f"Next to {published.name}", caption, head, rows)] if rows else []


def _spread(mean: float, spread: float) -> str:
    return decimal(mean) if math.isnan(spread) else f"{mean:.3f} ± {spread:.3f}"
