"""The page about the published numbers: its figures are those of their sources, its counts follow from them."""

import itertools
from pathlib import Path

import pytest

from benchmarks.published_numbers import PAPER, coad_times, cohort_row
from cfusion.report.comparison.published_results import read_published

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/published-numbers.md").read_text()
COHORTS = ("tcga_blca", "tcga_brca", "tcga_coad", "tcga_gbmlgg", "tcga_luad", "tcga_ucec")
LABELS = {
    "noise, independent epochs: mean": "null_independent",
    "noise, independent epochs: 97.5% limit": "null_independent_high",
    "noise, correlated epochs: mean": "null_correlated",
    "noise, correlated epochs: 97.5% limit": "null_correlated_high",
    "age, sex, stage, grade": "clinical",
}
"""Rows of the page, and their figures in the benchmark."""


def rows(label: str) -> list[list[str]]:
    """The cells of every row of the page's tables that begins with a label."""
    return [line.split("|")[2:-1] for line in PAGE.splitlines() if line.startswith(f"| {label} |")]


def values(label: str) -> dict[str, float]:
    return dict(zip(COHORTS, map(float, rows(label)[0]), strict=True))


def test_the_range_of_the_published_results_and_their_number():
    published = read_published(PAPER).results
    assert f"hold {len(published)} different results" in PAGE
    for label, of in (("20 published results, lowest", "min"), ("20 published results, highest", "max")):
        found = published.groupby("cohort")["cindex_mean"].agg(of)
        assert values(label) == {cohort: pytest.approx(found[cohort]) for cohort in COHORTS}
    spread = published["cindex_std"]
    text = " ".join(PAGE.split())
    assert f"{spread.min():.3f} to {spread.max():.3f}, median {spread.median():.3f}".replace("0.", ".") in text


def test_the_number_of_pairs_that_differ_by_less_than_their_spread():
    smaller = pairs = 0
    for _, rows in read_published(PAPER).results.groupby("cohort"):
        for one, other in itertools.combinations(rows.itertuples(), 2):
            pairs += 1
            smaller += abs(one.cindex_mean - other.cindex_mean) < min(one.cindex_std, other.cindex_std)
    assert f"in {smaller} of the {pairs:,} pairs" in " ".join(PAGE.split())


def test_the_counts_follow_from_the_figures_of_the_page():
    published = read_published(PAPER).results
    for label in LABELS:
        limits, counts = values(label), [int(cell) for cell in rows(label)[1]]
        below = [
            int((published.loc[published["cohort"] == cohort, "cindex_mean"] < limits[cohort]).sum())
            for cohort in COHORTS
        ]
        # The page rounds the figure that results are counted below, so a result may be as close as this to it.
        close = [
            int(((published.loc[published["cohort"] == cohort, "cindex_mean"] - limits[cohort]).abs() < 5e-4).sum())
            for cohort in COHORTS
        ]
        for found, expected, unsure in zip(counts, below, close, strict=False):
            assert expected <= found <= expected + unsure, label
        assert counts[-1] == sum(counts[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("cohort", COHORTS)
def test_the_figures_of_a_cohort_are_those_of_the_benchmark(cohort: str):
    published = read_published(PAPER).results
    found = cohort_row(cohort, published[published["cohort"] == cohort], 200)
    for label, key in LABELS.items():
        assert f"{values(label)[cohort]:.3f}" == f"{found[key]:.3f}", label
        assert int(rows(label)[1][COHORTS.index(cohort)]) == found[f"below_{key}"], label


@pytest.mark.slow
def test_what_the_page_says_about_coad_is_what_its_tables_hold():
    found, text = coad_times(), " ".join(PAGE.split())
    numbers = [f"{months:.0f}" for months in found["deaths_at_zero"]]
    assert found["status_differs"] == 0
    for words in (
        f"in all but {found['apart']} of {found['known']} patients",
        f"{found['apart_deaths']} of these died",
        f"at {', '.join(numbers[:-1])} and {numbers[-1]} months in TCGA-CDR",
        f"{found['zero_months']} patients stand at month 0",
        f"within {found['others_at_most']:.1f} months",
        f"score {found['clinical_with_cdr']:.3f} instead of {found['clinical']:.3f}".replace("0.", "."),
    ):
        assert words in text, words
