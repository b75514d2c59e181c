"""Test the rule that doubts a flipped event column."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.polarity import Censoring, error_rates, wrong_of_packaged
from cfusion.cohort.audit import audit
from cfusion.cohort.findings import outcome_doubts, polarity, polarity_words
from cfusion.cohort.read import read_cohort
from cfusion.config import CohortConfig


@pytest.mark.parametrize(("censoring", "most_unclear"), [("accrual", 0.04), ("dropout", 0.1), ("tail", 0.3)])
def test_the_rule_errs_on_at_most_two_percent_of_simulated_cohorts(censoring: Censoring, most_unclear: float) -> None:
    """1,000 cohorts with 8–60% events, each with the right and with the flipped column."""
    wrong, unclear = error_rates(polarity, censoring, 1000)
    assert wrong <= 0.02
    assert unclear <= most_unclear


def test_the_six_cohorts_of_the_package_pass_and_their_flipped_tables_do_not() -> None:
    assert wrong_of_packaged(polarity) == 0


def like_brca(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Long survival, short follow-up, about 12% events: events have the longer median follow-up."""
    generator = np.random.default_rng(seed)
    happens = 250 * generator.weibull(1.4, 800)
    leaves = np.minimum(generator.gamma(1.2, 35, 800), 280)
    return np.minimum(happens, leaves).round(2) + 0.1, happens <= leaves


@pytest.mark.parametrize("seed", range(5))
def test_a_cohort_like_brca(tmp_path: Path, seed: int) -> None:
    time, event = like_brca(seed)
    assert 0.05 < event.mean() < 0.2
    assert np.median(time[event]) > np.median(time[~event])
    for column, expected in ((event, {}), (~event, {"polarity": 1})):
        rows = pd.DataFrame({"patient": [f"p{i}" for i in range(800)], "time": time, "event": column.astype(int)})
        rows.to_csv(tmp_path / "table.csv", index=False)
        assert audit(read_cohort(CohortConfig(table=tmp_path / "table.csv")), []).counts() == expected


def test_the_order_of_rows_does_not_matter_when_the_longest_times_are_tied() -> None:
    time, event = np.minimum(np.arange(1.0, 101), 60), np.arange(100) % 4 == 0
    order = np.random.default_rng(0).permutation(100)
    messages = [
        [f.message for f in outcome_doubts("c", pd.Series(time[i]), pd.Series(~event[i]))] for i in (slice(None), order)
    ]
    assert messages[0] == messages[1]
    assert "76% of the 41 followed longest have the event" in messages[0][0]


def test_few_events_are_not_doubted() -> None:
    time = np.arange(1.0, 61)
    assert polarity(time, np.arange(60) > 50) == "as stated"
    assert polarity(time, np.arange(60) < 51) == "as stated"
    assert polarity(time, np.arange(60) > 25) == "flipped"


def test_times_that_cannot_tell_say_so() -> None:
    """Every second patient has the event, at all times alike: the table and its opposite look the same."""
    time, event = np.arange(1.0, 201), np.arange(200) % 2 == 0
    assert {polarity(time, event), polarity(time, ~event)} <= {"rather as stated", "rather flipped"}
    later = np.where(event, time + 1.5, time)
    assert polarity(later, event) == "rather flipped"
    (finding,) = outcome_doubts("c", pd.Series(later), pd.Series(event))
    assert finding.kind == "polarity"
    assert "the times cannot tell whether the column is flipped; check the meaning of 1" in finding.message
    assert polarity(later, ~event) == "rather as stated"
    assert outcome_doubts("c", pd.Series(later), pd.Series(~event)) == []
    assert "the times cannot tell" in polarity_words(later, ~event)
