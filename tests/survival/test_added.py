"""What a risk adds to clinical covariates: R's figures, and made-up risks whose addition is known."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_outcomes import cohort, predicted

from cfusion.cohort.covariates import read_covariates
from cfusion.cohort.splits import make_splits
from cfusion.config import SplitsConfig
from cfusion.errors import CohortError, UndefinedMetricError
from cfusion.survival.added import AddedInRun, ClinicalModel, is_constant, mean_added, standardised
from cfusion.survival.decision import DecisionCurve, decision_curve, mean_decision_curve
from cfusion.survival.predictions import read_predictions
from cfusion.survival.regression import (
    AdjustedRatio,
    adjusted_ratio,
    cox_log_likelihood,
    mean_ratio,
    orders_all_events,
    predicted_by_cox,
)
from cfusion.survival.score import Scores, score


@pytest.fixture(scope="module")
def published(material: Path) -> pd.DataFrame:
    return read_predictions(material / "published/mcat_iccv2021/predictions.csv")


def test_hazard_ratios_and_likelihood_ratios_are_those_of_r(published: pd.DataFrame, material: Path) -> None:
    figures = pd.read_csv(material / "clinic/adds_to_clinic.csv")
    adding = []
    for cohort_name, rows in figures.groupby("cohort"):
        table = f"package:tcga/covariates/tcga_{cohort_name}.csv"
        clinical: float | None = None
        for row in rows.to_dict("records"):
            mine = published[(published["model"] == row["model"]) & (published["cohort"] == cohort_name)]
            values = read_covariates([Path(table)], mine["case_id"])
            assert values is not None
            others = values.loc[mine["case_id"]]
            time, event, risk, fold = (mine[c].to_numpy() for c in ("survival_months", "event", "risk", "fold"))
            z = standardised(risk, fold)
            clinical = cox_log_likelihood(others, time, event, fold) if clinical is None else clinical
            found = adjusted_ratio(z, others, time, event, fold, clinical)
            assert [found.ratio, found.low, found.high, found.chi2, found.p] == pytest.approx(
                [row[name] for name in ("hr_adjusted", "low", "high", "lr_chisq", "lr_p")], abs=1e-4
            )
            unadjusted = adjusted_ratio(z, others[[]], time, event, fold)
            assert unadjusted.ratio == pytest.approx(row["hr_unadjusted"], abs=1e-4)
            adding += [(row["model"], cohort_name)] if found.p < 0.05 else []
    assert adding == [("AMIL", "gbmlgg"), ("AMIL", "ucec")]


@pytest.fixture(scope="module")
def added() -> Scores:
    """Model `m` sees the truth; the clinical covariates see half of it, and one patient in ten is unknown."""
    full = cohort(200, seed=3)
    generator = np.random.default_rng(5)
    stage = np.digitize(full.cases["truth"] + generator.normal(size=200), [-1, 0, 1]) + 1.0
    covariates = pd.DataFrame({"age": generator.normal(60, 9, 200), "stage": stage}, index=full.cases.index)
    covariates.iloc[::10] = np.nan
    splits = make_splits(full, SplitsConfig(), "strict")
    tables = [predicted(full, splits, "m", "strict"), predicted(full, splits, "noise", "strict", noise=50.0)]
    constant = tables[0].assign(model="constant", risk=tables[0]["fold"] * 1.0)
    frame = pd.concat([*tables, constant], ignore_index=True)
    return score(frame, full, splits, covariates=covariates, bootstrap=100)


@pytest.mark.slow
def test_a_risk_that_knows_more_adds_and_noise_does_not(added: Scores) -> None:
    rows = added.summary.set_index("model")
    assert rows["clinical_c"].nunique() == 1
    assert rows["clinical_covariates"].unique().tolist() == ["age, stage"]
    good, noise, constant = (rows.loc[name] for name in ("m", "noise", "constant"))
    assert good["added_c_low"] > 0.02
    assert good["added_c"] == pytest.approx(good["both_c"] - good["clinical_c"])
    assert good["added_c_p"] < 0.01
    assert good["hr_sd_adjusted_low"] > 1.5
    assert good["added_lr_p"] < 1e-6
    assert good["added_brier_high"] < 0
    assert noise["added_c_low"] < 0 < noise["added_c_high"]
    assert noise["added_lr_p"] > 0.01
    assert constant["added_c"] == 0
    assert np.isnan(constant["hr_sd_adjusted"])
    assert any("constant (strict): no model" in note for note in added.notes)


def test_the_outcome_of_a_patient_does_not_reach_its_own_clinical_risk() -> None:
    generator = np.random.default_rng(1)
    values = pd.DataFrame({"age": generator.normal(size=60)})
    time, event, training = generator.exponential(20, 60), generator.random(60) < 0.6, np.arange(60) < 40
    months = np.array([12.0])
    before = predicted_by_cox(values, time, event, training, months)
    other = np.where(training, time, 1.0)
    after = predicted_by_cox(values, other, np.where(training, event, True), training, months)
    assert before.risk.tolist() == after.risk.tolist()
    assert before.survival.tolist() == after.survival.tolist()
    assert not np.isnan(predicted_by_cox(values.mask(values > 0), time, event, training, months).risk).any()
    nothing = predicted_by_cox(values[[]], time, event, training, months)
    assert nothing.risk.tolist() == [0.0] * 20
    with pytest.raises(UndefinedMetricError, match="none of the 40 training patients"):
        predicted_by_cox(values, time, event & ~training, training, months)


def test_risks_that_32_bits_do_not_tell_apart_are_constant() -> None:
    assert is_constant(np.array([-3.0, -3.0, -3.0000007]))
    assert not is_constant(np.array([-3.0, -3.0, -3.001]))
    assert standardised(np.array([1.0, 3.0, 5.0, 5.0]), np.array([0, 0, 1, 1])).round(3).tolist() == [
        -0.707,
        0.707,
        0,
        0,
    ]


def test_net_benefit_without_censoring() -> None:
    """Vickers and Elkin: true positives less false positives × odds of the threshold, per patient."""
    time, event = np.array([5.0, 6.0, 30.0, 40.0, 50.0]), np.ones(5, dtype=bool)
    risk = np.array([0.9, 0.3, 0.6, 0.2, 0.1])
    found = decision_curve(time, event, {"m": (1 - risk)[:, None]}, np.array([12.0]), [12.0])
    assert found is not None
    at = found.thresholds.index(0.5)
    assert found.benefit["m"][at] == pytest.approx(1 / 5 - 1 / 5 * 1)
    assert found.benefit["everyone"][at] == pytest.approx(2 / 5 - 3 / 5 * 1)
    assert decision_curve(time, event, {"m": (1 - risk)[:, None]}, np.array([99.0]), [99.0]) is None


def test_tables_of_covariates_that_contradict_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("case_id,age\na,50\nb,60\n")
    two.write_text("case_id,age\nb,61\n")
    found = read_covariates([one], ["a"])
    assert found is not None
    assert found["age"].to_dict() == {"a": 50.0, "b": 60.0}
    assert read_covariates([], ["a"]) is None
    with pytest.raises(CohortError, match="b: is a patient of two tables"):
        read_covariates([one, two], ["a"])
    with pytest.raises(CohortError, match="none of the predicted patients"):
        read_covariates([one], ["x"])


@pytest.mark.slow
def test_what_a_risk_adds_is_the_mean_over_seeds_and_repeats() -> None:
    """The first run knows nothing; the same run ten times has the interval of one."""
    full = cohort(90, seed=4)
    covariates = pd.DataFrame({"age": np.random.default_rng(1).normal(60, 9, 90)}, index=full.cases.index)
    splits = make_splits(full, SplitsConfig(folds=3), "strict")
    good = predicted(full, splits, "good", "strict")
    blind = predicted(full, splits, "blind", "strict", noise=50.0)
    parts = [good, blind, good.assign(model="mean", seed=1), blind.assign(model="mean", seed=0)]
    parts += [good.assign(model="same", seed=seed) for seed in range(2)]
    found = score(pd.concat(parts, ignore_index=True), full, splits, covariates=covariates, bootstrap=20)
    rows = found.summary.set_index("model")
    names = ["clinical_c", "clinical_c_mean", "both_c", "added_c", "risk_less_clinical_c", "added_brier", "added_lr"]
    for name in names:
        expected = (rows.loc["good", name] + rows.loc["blind", name]) / 2
        assert rows.loc["mean", name] == pytest.approx(expected, abs=1e-9), name
    assert rows.loc["mean", "hr_sd_adjusted"] == pytest.approx(
        np.sqrt(rows.loc["good", "hr_sd_adjusted"] * rows.loc["blind", "hr_sd_adjusted"])
    )
    assert rows["added_runs"].to_dict() == {"good": 1, "blind": 1, "mean": 2, "same": 2}
    for name in [*names, "added_c_low", "added_c_high", "added_c_p", "hr_sd_adjusted_low", "hr_sd_adjusted_p"]:
        assert rows.loc["same", name] == pytest.approx(rows.loc["good", name], rel=1e-6, abs=1e-12), name


def test_repeating_a_run_narrows_no_interval() -> None:
    generator = np.random.default_rng(0)
    clinical = (0.6, generator.normal(0.6, 0.03, 200))
    both, other = ((value, generator.normal(value, 0.03, 200)) for value in (0.7, 0.65))
    run = AddedInRun(("age",), clinical, 0.61, both, other, None, None, 0.2, (-0.01, generator.normal(size=200)), None)
    once, again = mean_added([run]), mean_added([run] * 5)
    assert (once.runs, again.runs) == (1, 5)
    assert again.difference.low == pytest.approx(once.difference.low)
    assert again.brier_difference.high == pytest.approx(once.brier_difference.high)
    assert again.p == pytest.approx(once.p)
    worse = dataclasses.replace(run, both=clinical)
    mean = mean_added([run, worse])
    assert mean.difference.value == pytest.approx(0.05)
    assert mean.against.value == pytest.approx(0.05)


def test_means_over_runs_that_lack_a_part() -> None:
    ratio = AdjustedRatio(2.0, 1.0, 4.0, 0.05, 3.84, 0.05)
    assert mean_ratio([ratio]) is ratio
    assert mean_ratio([ratio, None]) is None
    assert mean_ratio([None]) is None
    same = mean_ratio([ratio, ratio])
    assert same is not None
    assert [same.ratio, same.low, same.high, same.chi2] == pytest.approx([2, 1, 4, 3.84])
    assert same.wald_p == pytest.approx(0.05, abs=1e-6)
    short = DecisionCurve(12, (0.02, 0.04), {"m": (0.4, 0.2), "everyone": (0.5, 0.4)})
    long = DecisionCurve(12, (0.02, 0.04, 0.06), {"m": (0.2, 0.2, 0.1), "everyone": (0.5, 0.4, 0.3)})
    mean = mean_decision_curve([short, None, long])
    assert mean is not None
    assert mean.benefit["m"] == pytest.approx((0.3, 0.2, 0.05))
    assert mean.benefit["everyone"] == (0.5, 0.4, 0.3)
    assert mean_decision_curve([None]) is None


def test_a_risk_that_orders_all_events_has_no_finite_coefficient() -> None:
    generator = np.random.default_rng(0)
    time, event = generator.exponential(20, 80) + 0.1, generator.random(80) < 0.5
    fold = np.arange(80) % 4
    assert orders_all_events(-time, time, event)
    assert not orders_all_events(time, time, event)
    assert not orders_all_events(np.zeros(80), time, event)
    swapped = -time
    first, later = np.argsort(np.where(event, time, np.inf))[[2, 5]]
    swapped[[first, later]] = swapped[[later, first]]
    assert not orders_all_events(swapped, time, event)
    within = np.where(fold == 0, 0.0, -time + 100 * fold)
    assert orders_all_events(within, time, event, fold)
    assert not orders_all_events(within, time, event)
    tied = np.array([1.0, 1, 2, 3])
    assert orders_all_events(np.array([2.0, 2, 1, 1]), tied, np.array([True, True, False, False]))
    assert not orders_all_events(np.array([3.0, 2, 1, 1]), tied, np.array([True, True, False, False]))
    z = (within - within.mean()) / within.std()
    with pytest.raises(UndefinedMetricError, match=r"monotone likelihood|no finite estimate"):
        adjusted_ratio(z, pd.DataFrame(index=range(80)), time, event, fold)


def test_curves_of_a_separated_model_are_finite_and_right() -> None:
    """Log hazards far apart: the sums over the patients still followed are compared with sums made one by one."""
    generator = np.random.default_rng(0)
    time, event = generator.exponential(20, 100) + 0.1, generator.random(100) < 0.5
    values = pd.DataFrame({"age": generator.normal(size=100), "days_to_death": -time})
    training, months = np.arange(100) < 80, np.array([0.05, 6.0, 12.0, 60.0])
    found = predicted_by_cox(values, time, event, training, months)
    assert found.separated == "days_to_death"
    assert np.ptp(found.training_risk) > 30
    seen, happened, risk = time[:80], event[:80], found.training_risk
    hazard = [sum(1 / np.exp(risk[seen >= t]).sum() for t in sorted(seen[happened]) if t <= month) for month in months]
    np.testing.assert_allclose(found.survival, np.exp(-np.exp(found.risk)[:, None] * np.array(hazard)), rtol=1e-9)
    assert (found.survival[:, 0] == 1).all()
    assert predicted_by_cox(values[["age"]], time, event, training, months).separated is None
    without_events = values[["age"]].assign(rare=np.isin(np.arange(100), np.flatnonzero(~event)[:5]) * 1.0)
    assert predicted_by_cox(without_events, time, event, training, months).separated is None


def test_a_likelihood_without_a_maximum_names_the_covariate(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: object) -> None:
        raise ValueError("search direction contains NaN or infinite values")

    monkeypatch.setattr("cfusion.survival.regression.CoxPHSurvivalAnalysis.fit", fit)
    time, event = np.arange(1.0, 61), np.arange(60) % 2 == 0
    values = pd.DataFrame({"age": np.arange(60) % 7, "days_to_death": time})
    with pytest.raises(UndefinedMetricError) as refused:
        predicted_by_cox(values, time, event, np.arange(60) < 48, np.array([6.0]))
    assert "monotone likelihood (separation) by days_to_death: all or nearly all 24 events" in refused.value.message
    assert "a covariate that knows the outcome" in refused.value.remedy


@pytest.mark.parametrize(("patients", "columns", "needed"), [(12, 3, 15), (12, 1, 0), (20, 5, 25), (9, 1, 10)])
def test_few_events_of_an_external_cohort_give_no_clinical_model(patients: int, columns: int, needed: int) -> None:
    generator = np.random.default_rng(5)
    names = [f"P{number}" for number in range(patients)]
    run = pd.DataFrame(
        {"case_id": names, "survival_months": generator.exponential(20, patients), "event": True, "fold": 0}
    )
    values = pd.DataFrame(generator.normal(size=(patients, columns)), names, [f"x{k}" for k in range(columns)])
    if needed:
        with pytest.raises(UndefinedMetricError, match=rf"^{patients} events are too few .* x0.*; {needed} are needed"):
            ClinicalModel.fit(run, values, None, [12.0])
    else:
        assert ClinicalModel.fit(run, values, None, [12.0]) is not None
    in_folds = run.assign(fold=np.arange(patients) % 2)
    assert columns > 1 or ClinicalModel.fit(in_folds, values, None, [12.0]) is not None
