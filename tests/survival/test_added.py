"""What a risk adds to clinical covariates: R's figures, and made-up risks whose addition is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_outcomes import cohort, predicted

from cfusion.cohort.covariates import read_covariates
from cfusion.cohort.splits import make_splits
from cfusion.config import SplitsConfig
from cfusion.errors import CohortError, UndefinedMetricError
from cfusion.survival.added import is_constant, standardised
from cfusion.survival.decision import decision_curve
from cfusion.survival.predictions import read_predictions
from cfusion.survival.regression import adjusted_ratio, cox_log_likelihood, predicted_by_cox
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
