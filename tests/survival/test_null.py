"""The null reproduces the published simulation, is one half where nothing is chosen, and spreads like learnt noise."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cfusion.cohort.read import read_cohort
from cfusion.cohort.splits import make_splits
from cfusion.config import CohortConfig, SplitsConfig
from cfusion.errors import DataError, UndefinedMetricError
from cfusion.survival.metrics import concordance
from cfusion.survival.null import EpochChoice, Outcomes, comparable_pairs, scored_outcomes, simulate_null
from cfusion.survival.predictions import read_predictions
from cfusion.types import Cohort, Split

TABLE = {
    "blca": ("slide", 0.606, 0.572), "coad": ("slide", 0.662, 0.610), "luad": ("slide", 0.610, 0.578),
    "ucec": ("slide", 0.669, 0.621), "gbmlgg": ("case", 0.615, 0.580),
}  # fmt: skip


def assert_reproduces(folds: list[Outcomes], independent: float, correlated: float) -> None:
    settings = {"chosen_on_scored_fold": True, "repetitions": 40}
    assert simulate_null(folds, **settings).mean == pytest.approx(independent, abs=0.01)
    assert simulate_null(folds, autocorrelation=0.9, **settings).mean == pytest.approx(correlated, abs=0.01)


@pytest.mark.parametrize("name", TABLE)
def test_measured_null_of_the_published_protocol(tcga: Path, name: str) -> None:
    unit, independent, correlated = TABLE[name]
    cohort = read_cohort(CohortConfig(name=name, table=tcga / f"clinical/tcga_{name}.csv"))
    splits = make_splits(cohort, SplitsConfig(directory=tcga / f"splits/tcga_{name}"), "published")
    assert_reproduces(scored_outcomes(cohort, splits, unit), independent, correlated)


def test_measured_null_of_brca(material: Path) -> None:
    """The clinical table covers 871 of BRCA's 956 cases; the published predictions hold all outcomes."""
    table = read_predictions(material / "published/mcat_iccv2021/predictions.csv")
    rows = table[(table["cohort"] == "brca") & (table["model"] == "AMIL")]
    folds = [(f["survival_months"].to_numpy(), f["event"].to_numpy()) for _, f in rows.groupby("fold")]
    assert_reproduces(folds, 0.649, 0.606)


def test_further_repeats_score_the_same_patients_and_narrow_nothing(tcga: Path) -> None:
    cohort = read_cohort(CohortConfig(name="blca", table=tcga / "clinical/tcga_blca.csv"))
    once, thrice = (make_splits(cohort, SplitsConfig(repeats=repeats), "strict") for repeats in (1, 3))
    assert len(thrice) == 3 * len(once)
    of_repeats = scored_outcomes(cohort, thrice)
    assert len(of_repeats) == len(once)
    settings = {"chosen_on_scored_fold": False, "repetitions": 50}
    assert simulate_null(of_repeats, **settings) == simulate_null(scored_outcomes(cohort, once), **settings)


def fold(size: int = 80, seed: int = 0) -> Outcomes:
    generator = np.random.default_rng(seed)
    return generator.exponential(30, size), generator.random(size) < 0.3


def test_without_choice_the_null_is_one_half() -> None:
    null = simulate_null([fold(seed=k) for k in range(5)], chosen_on_scored_fold=False, repetitions=2000)
    assert null.mean == pytest.approx(0.5, abs=0.003)
    assert null.low < 0.5 < null.high
    assert null == simulate_null([fold(seed=k) for k in range(5)], chosen_on_scored_fold=False, repetitions=2000)


def test_the_limit_has_its_monte_carlo_error() -> None:
    """The spread of the limit over independent simulations is what each of them states."""
    folds = [fold(seed=k) for k in range(3)]
    found = [simulate_null(folds, chosen_on_scored_fold=False, repetitions=400, seed=seed) for seed in range(60)]
    spread = np.std([null.high for null in found])
    stated = np.mean([null.high_error for null in found])
    assert 0.7 < spread / stated < 1.4
    more = simulate_null(folds, chosen_on_scored_fold=False, repetitions=1600)
    assert more.high_error == pytest.approx(stated / 2, rel=0.1)


def test_choosing_on_fewer_rows_from_more_epochs_is_more_optimistic() -> None:
    small = simulate_null([fold(40)], chosen_on_scored_fold=True)
    large = simulate_null([fold(160)], chosen_on_scored_fold=True)
    short = simulate_null([fold(40)], chosen_on_scored_fold=True, choice=EpochChoice(epochs=10))
    assert 0.5 < large.mean < small.mean
    assert short.mean < small.mean
    slow = simulate_null([fold(40)], chosen_on_scored_fold=True, autocorrelation=0.99)
    assert slow.mean < small.mean


def test_one_epoch_is_plain_concordance() -> None:
    """With a single draw the simulated C of one fold is Harrell's C of that draw."""
    time, event = fold(50)
    order = np.argsort(time)
    time, event = time[order], event[order]
    null = simulate_null([(time, event)], chosen_on_scored_fold=False, repetitions=2, seed=3)
    draws = np.random.default_rng(3).standard_normal((2, 1, 50), dtype=np.float32)[:, 0]
    assert null.mean == pytest.approx(np.mean([concordance(time, event, draw).cindex for draw in draws]), abs=1e-12)


def test_folds_that_train_each_other_spread_more_than_independent_ones() -> None:
    folds = [fold(seed=k) for k in range(5)]
    together = simulate_null(folds, chosen_on_scored_fold=False)
    single = [simulate_null([one], chosen_on_scored_fold=False).sd for one in folds]
    assert 1.7 < together.sd**2 / (np.sum(np.square(single)) / 25) < 2.1
    assert simulate_null(folds[:1], chosen_on_scored_fold=False).sd == single[0]


def test_the_null_is_that_of_linear_models_of_random_features() -> None:
    """Here the features are drawn and the models trained, where `simulate_null` draws only what they amount to."""
    generator = np.random.default_rng(0)
    folds = [fold(size, size) for size in (90, 40, 40)]
    pairs = [comparable_pairs(*one) for one in folds]
    features = [generator.standard_normal((2000, len(one[0]), 20)) for one in folds]
    taught = [(x[:, first] - x[:, second]).sum(axis=1) for x, (first, second) in zip(features, pairs, strict=True)]
    means = np.zeros(2000)
    for x, (first, second), own in zip(features, pairs, taught, strict=True):
        risk = np.einsum("dpf,df->dp", x, sum(taught) - own)
        means += (risk[:, first] > risk[:, second]).mean(axis=1) / 3
    null = simulate_null(folds, chosen_on_scored_fold=False)
    assert null.sd == pytest.approx(means.std(), rel=0.05)
    assert (null.low, null.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)
    assert null.p_above(null.high) == pytest.approx(0.025, abs=0.01)


def test_the_order_of_the_rows_makes_no_difference() -> None:
    generator = np.random.default_rng(0)
    folds = [(*fold(seed=k), np.arange(80) % 2) for k in range(3)]
    orders = [generator.permutation(80) for _ in folds]
    mixed = [tuple(values[order] for values in one) for one, order in zip(folds, orders, strict=True)]
    assert simulate_null(mixed, chosen_on_scored_fold=False) == simulate_null(folds, chosen_on_scored_fold=False)


def test_patients_without_a_usable_outcome_are_left_out() -> None:
    index = pd.Index(["a", "b", "c", "d", "e"], name="case_id")
    event = pd.array([True, False, pd.NA, True, False], dtype="boolean")
    cases = pd.DataFrame({"time_months": [3.0, 0.0, 4.0, np.nan, -1.0], "event": event}, index=index)
    slides = pd.DataFrame({"case_id": index}, index=pd.Index([f"{case}-s" for case in index], name="slide_id"))
    split = Split(0, (), (), (*index, "stranger"))
    for unit in ("case", "slide"):
        ((time, happened),) = scored_outcomes(Cohort("made_up", cases, slides), [split], unit)
        assert (time.tolist(), happened.tolist()) == ([3.0, 0.0], [True, False])


def test_folds_without_pairs() -> None:
    with pytest.raises(UndefinedMetricError, match="fold 0 has no comparable pair"):
        simulate_null([(np.array([1.0, 2.0]), np.array([False, False]))], chosen_on_scored_fold=True)
    with pytest.raises(DataError, match="at least one fold"):
        simulate_null([], chosen_on_scored_fold=True)
