"""The sentences that a report opens with."""

import pandas as pd
import pytest
from made_up_outcomes import cohort, predicted

from cfusion.cohort.splits import make_splits
from cfusion.config import SplitsConfig
from cfusion.report.opening import covariate_words, opening_lines, short
from cfusion.report.patients_section import described
from cfusion.survival.description import restricted_mean
from cfusion.survival.score import score

ROW = {
    "cohort": "study", "model": "m", "protocol": "strict", "cindex_within": 0.74, "within_low": 0.70,
    "within_high": 0.78, "null_high": 0.55, "clinical_covariates": "age, stage, grade", "clinical_c": 0.71,
    "added_c": 0.03, "added_c_low": 0.001, "added_c_high": 0.06, "added_lr_p": 0.01, "hr_sd_adjusted": 1.4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "study: m ranks patients better than chance (strict protocol: C .74, 95% "
         ".70–.78; noise reaches .55); "
         "it adds .03 (.00 to .06) to age, stage and grade, which reach .71 by themselves."),
        ({"within_low": 0.48}, "m is not shown to rank patients better than chance"),
        ({"null_high": 0.75}, "m is not shown to rank patients better than chance"),
        ({"within_high": 0.45, "within_low": 0.3}, "worse than chance; check the sign of the risk"),
        ({"protocol": "published", "null_high": 0.72}, "m is not shown to rank patients better than chance (published "
         "protocol, whose epoch was chosen on the scored fold: C .74"),
        ({"added_c_low": -0.01}, "(adjusted hazard ratio 1.40 per SD, likelihood ratio p = 0.010), but its gain in C"),
        ({"added_c_low": -0.01, "added_lr_p": 0.4}, "it is not shown to add to age, stage and grade"),
        ({"clinical_covariates": float("nan")}, "reaches .55)."),
    ],
)  # fmt: skip
def test_a_sentence_says_what_the_numbers_show(changed: dict, words: str) -> None:
    (line,) = opening_lines([{**ROW, **changed}], [])
    assert words in line


def test_numbers_and_names_are_short() -> None:
    assert [short(0.745), short(-0.004, 3), short(-0.001), short(1.0)] == [".74", "−.004", ".00", "1.00"]
    assert covariate_words("age, sex=male, stage") == "age, sex and stage"


def test_predicted_survival_and_patients_are_described() -> None:
    full = cohort(150, seed=4)
    covariates = pd.DataFrame({"age": full.cases["truth"].rank(), "sex=male": (full.cases["truth"] > 0).astype(float)})
    splits = make_splits(full, SplitsConfig(), "strict")
    scores = score(predicted(full, splits, "m", "strict"), covariates=covariates, bootstrap=50)
    row = {**scores.summary.iloc[0].to_dict(), "null_high": 0.55}
    (line,) = opening_lines([row], [scores])
    assert "predicted 3-year survival is" in line
    (result,) = described([scores])
    found = result.description
    assert [name for name, _ in result.folds] == ["patients", "events", "age (median)", "sex: male (share)"]
    assert sum(int(cell) for cell in result.folds[0][1]) == 150
    assert {"sex: male", "sex: not male", "age ≤ 75.5", "age > 75.5"} == {group.name for group in found.subgroups}
    assert all(group.low < group.cindex < group.high for group in found.subgroups)
    assert found.mean_survival is not None
    assert found.mean_survival.low > 0
    assert 0 < found.proportional_p <= 1
    assert found.follow_up > 0


def test_restricted_mean_is_that_of_lifelines() -> None:
    from lifelines import KaplanMeierFitter
    from lifelines.utils import restricted_mean_survival_time

    cases = cohort(80, seed=1).cases
    time, event = cases["time_months"].to_numpy(), cases["event"].to_numpy()
    fitted = KaplanMeierFitter().fit(time, event)
    mean, variance = restricted_mean(time, event, 30.0)
    assert mean == pytest.approx(restricted_mean_survival_time(fitted, t=30.0), rel=1e-6)
    assert 0 < variance < 10
