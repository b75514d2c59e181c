"""Test that outcomes are permuted before folds are made, so that every permutation can be trained."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from cfusion.cohort.audit import audit
from cfusion.cohort.permutation import naming_the_permutation, permuted, permuted_folds
from cfusion.cohort.splits import make_splits, write_splits
from cfusion.config import EvaluationConfig, SplitsConfig
from cfusion.errors import ConfigError, DataError
from cfusion.types import Cohort


def rare(events: int = 14, size: int = 100) -> Cohort:
    """A cohort in which a third of the permutations after drawing would leave some side without an event."""
    generator = np.random.default_rng(1)
    happened = np.isin(np.arange(size), generator.choice(size, events, replace=False))
    # The last event at half the follow-up: each side has comparable pairs.
    time = np.where(happened, generator.uniform(1, 30, size), generator.uniform(31, 60, size)).round(2)
    cases = pd.DataFrame({"time_months": time, "event": happened}, index=[f"P{i:03d}" for i in range(size)])
    return Cohort(
        "rare", cases.rename_axis("case_id"), pd.DataFrame({"case_id": []}, index=pd.Index([], name="slide_id"))
    )


@pytest.mark.parametrize("settings", [{}, {"validation_fraction": 0.25}, {"repeats": 2}])
def test_every_permutation_of_drawn_folds_can_be_trained(settings: dict) -> None:
    cohort = rare()
    splits = SplitsConfig(**settings)
    drawn = set()
    for seed in range(12):
        shuffled, folds = permuted_folds(cohort, splits, EvaluationConfig(permute_outcomes=seed))
        assert audit(shuffled, folds, n_bins=2).splits == folds
        drawn.add(tuple(shuffled.cases["event"]))
    assert len(drawn) == 12


def test_outcomes_permuted_after_drawing_would_leave_sides_without_events() -> None:
    """The order that the program had: the test that every permutation can be trained is not empty."""
    cohort = rare()
    folds = make_splits(cohort, SplitsConfig(validation_fraction=0.25))
    events = [permuted(cohort, seed).cases["event"] for seed in range(100)]
    bad = [not all(e[list(side)].any() for s in folds for side in (s.train, s.validation, s.test)) for e in events]
    assert sum(bad) > 10


def test_published_folds_keep_their_events_within_folds(tmp_path: Path) -> None:
    cohort = rare()
    write_splits(make_splits(cohort, SplitsConfig(), "fixed-epoch"), tmp_path / "splits")
    splits = SplitsConfig(directory=tmp_path / "splits")
    real = make_splits(cohort, splits)
    for seed in range(20):
        settings = EvaluationConfig(permute_outcomes=seed, permute_within="folds")
        shuffled, folds = permuted_folds(cohort, splits, settings)
        for split, of_real in zip(audit(shuffled, folds, n_bins=2).splits, real, strict=True):
            assert split.test == of_real.test
            outcomes = [c.cases.loc[list(split.test)].sort_values("time_months") for c in (cohort, shuffled)]
            np.testing.assert_array_equal(outcomes[0].to_numpy(), outcomes[1].to_numpy())
        assert not shuffled.cases["time_months"].equals(cohort.cases["time_months"])
    with pytest.raises(ConfigError, match="repeats have other folds"):
        permuted_folds(cohort, SplitsConfig(repeats=2), settings)


def test_the_error_of_a_permutation_that_cannot_be_trained_names_its_remedy() -> None:
    cohort = rare()
    folds = make_splits(cohort, SplitsConfig(validation_fraction=0.25))

    def refused(permute: int | None, within: Literal["cohort", "folds"]) -> DataError:
        settings = EvaluationConfig(permute_outcomes=permute, permute_within=within)
        none_happened = dataclasses.replace(cohort, cases=cohort.cases.assign(event=cohort.cases.index == "P001"))
        with pytest.raises(DataError, match="no event") as error, naming_the_permutation(settings):
            audit(none_happened, folds, n_bins=2)
        return error.value

    assert refused(3, "cohort").message.startswith("outcomes permuted with evaluation.permute_outcomes=3: ")
    assert "evaluation.permute_within=folds" in refused(3, "cohort").remedy
    assert refused(None, "cohort").remedy == refused(3, "folds").remedy == "Draw other folds."


def test_incomplete_outcomes_stay_where_they_are_and_covariates_do_not_move() -> None:
    cohort = rare()
    cases = cohort.cases.assign(age=np.arange(100), event=cohort.cases["event"].astype("boolean"))
    cases.loc["P003", "event"] = pd.NA
    cases.loc["P007", "time_months"] = np.nan
    shuffled = permuted(dataclasses.replace(cohort, cases=cases), 3).cases
    assert shuffled["event"].isna().to_numpy().nonzero()[0].tolist() == [3]
    assert shuffled["time_months"].isna().to_numpy().nonzero()[0].tolist() == [7]
    assert shuffled["age"].equals(cases["age"])
    pairs = [
        sorted(zip(c["time_months"], c["event"].astype(int), strict=True)) for c in (cases.dropna(), shuffled.dropna())
    ]
    assert pairs[0] == pairs[1]
