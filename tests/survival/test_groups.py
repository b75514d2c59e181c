"""Risk groups compared with lifelines, an independent program."""

import lifelines
import numpy as np
import pandas as pd
import pytest
from lifelines.statistics import logrank_test
from scipy.stats import chi2
from sksurv.compare import compare_survival
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from cfusion.errors import UndefinedMetricError
from cfusion.survival.groups import at_risk, hazard_ratio, kaplan_meier, log_rank


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    generator = np.random.default_rng(4)
    risk = generator.normal(size=240)
    fold = generator.integers(0, 4, 240)
    happens = generator.exponential(30 * np.exp(-risk + fold / 2)).round() + 1
    leaves = generator.exponential(40, 240).round() + 1
    return pd.DataFrame({
        "time": np.minimum(happens, leaves), "event": happens <= leaves, "high": risk > 0, "risk": risk, "fold": fold,
    })  # fmt: skip


def arrays(data: pd.DataFrame, *names: str) -> list[np.ndarray]:
    return [data[name].to_numpy() for name in names]


def test_kaplan_meier(data: pd.DataFrame) -> None:
    time, event = arrays(data, "time", "event")
    curve = kaplan_meier(time, event)
    oracle = lifelines.KaplanMeierFitter().fit(time, event)
    np.testing.assert_allclose(curve.survival, oracle.predict(curve.months), atol=1e-6)
    limits = oracle.confidence_interval_.loc[list(curve.months[1:-1])]
    np.testing.assert_allclose(curve.low[1:-1], limits.iloc[:, 0], atol=1e-4)
    np.testing.assert_allclose(curve.high[1:-1], limits.iloc[:, 1], atol=1e-4)
    assert curve.months[-1] == time.max()
    assert (curve.size, curve.events) == (240, event.sum())
    assert at_risk(time, [0, 10.5]) == [240, (time > 10.5).sum()]


def test_log_rank(data: pd.DataFrame) -> None:
    time, event, high, fold = arrays(data, "time", "event", "high", "fold")
    expected = logrank_test(time[high], time[~high], event[high], event[~high]).p_value
    assert log_rank(time, event, high) == pytest.approx(expected, rel=1e-9)
    assert log_rank(time, event, high, np.zeros(240)) == pytest.approx(expected, rel=1e-9)
    assert log_rank(time, event, high) == pytest.approx(
        compare_survival(Surv.from_arrays(event, time), high)[1], rel=1e-9
    )
    assert log_rank(time, event, ~high, fold) == pytest.approx(log_rank(time, event, high, fold), rel=1e-9)
    # stratified, from the definition
    difference = variance = 0.0
    for k in np.unique(fold):
        rows = data[data["fold"] == k]
        for month in rows.loc[rows["event"], "time"].unique():
            followed = rows[rows["time"] >= month]
            dies, n, share = (followed["event"] & (followed["time"] == month)), len(followed), followed["high"].mean()
            difference += (dies & followed["high"]).sum() - dies.sum() * share
            variance += dies.sum() * share * (1 - share) * (n - dies.sum()) / max(n - 1, 1)
    assert log_rank(time, event, high, fold) == pytest.approx(chi2.sf(difference**2 / variance, df=1), rel=1e-9)


def test_hazard_ratio(data: pd.DataFrame) -> None:
    time, event, high, risk, fold = arrays(data, "time", "event", "high", "risk", "fold")
    efron = CoxPHSurvivalAnalysis(ties="efron").fit(risk[:, None], Surv.from_arrays(event, time))
    assert hazard_ratio(time, event, risk).coefficient == pytest.approx(efron.coef_[0], abs=1e-6)
    frame = data[["time", "event", "high", "fold"]].astype(float)
    fitter = lifelines.CoxPHFitter().fit(frame, "time", "event", strata=["fold"], fit_options={"precision": 1e-12})
    oracle = fitter.summary.loc["high"]
    found = hazard_ratio(time, event, high, fold)
    assert found.ties == "Efron"
    assert found.ratio == pytest.approx(oracle["exp(coef)"], rel=1e-5)
    assert found.error == pytest.approx(oracle["se(coef)"], rel=1e-4)
    assert found.low == pytest.approx(oracle["exp(coef) lower 95%"], rel=1e-4)
    assert found.high == pytest.approx(oracle["exp(coef) upper 95%"], rel=1e-4)


def test_groups_that_cannot_be_compared() -> None:
    time, event = np.arange(1.0, 11), np.ones(10, dtype=bool)
    with pytest.raises(UndefinedMetricError, match="no fold holds both risk groups"):
        log_rank(time, event, np.zeros(10, dtype=bool))
    with pytest.raises(UndefinedMetricError, match="covariate is constant"):
        hazard_ratio(time, event, np.full(10, 0.1))
    with pytest.raises(UndefinedMetricError, match="no finite estimate"):
        hazard_ratio(time, time < 6, time < 6)
