"""Metrics compared with oracles: published pairs, lifelines, closed forms; undefined scores are not returned."""

import lifelines
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lifelines.utils import concordance_index
from sksurv.datasets import load_whas500
from sksurv.metrics import integrated_brier_score
from sksurv.util import Surv

from cfusion.errors import DataError, UndefinedMetricError
from cfusion.survival.bootstrap import (
    CROSS_VALIDATION,
    Resamples,
    cross_validated_interval,
    cross_validated_p,
    percentile_interval,
)
from cfusion.survival.metrics import (
    Training,
    auc_at,
    brier_times,
    concordance,
    integrated_brier,
    uno_cindex,
)

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def cohort(size: int, seed: int = 0, censoring: float = 40.0, decimals: int = 8) -> Data:
    generator = np.random.default_rng(seed)
    risk = generator.normal(size=size)
    happens = generator.exponential(30 * np.exp(-risk))
    leaves = generator.exponential(censoring, size)
    return np.minimum(happens, leaves).round(decimals), happens < leaves, risk


WHAS500_WEIGHTS = {
    "afb": 0.032495112, "age": 0.011509087, "av3": 0.263353411, "bmi": -0.016266486, "chf": 0.147272116,
    "cvd": -0.083079717, "diasbp": -0.007779131, "gender": -0.089521275, "hr": 0.005718328, "los": -0.01306119,
    "miord": -0.131019301, "mitype": -0.036162819, "sho": 0.278858294, "sysbp": 0.002440193,
}  # fmt: skip
"""The linear risk of scikit-survival's reference for the Worcester heart attack study."""


def test_whas500() -> None:
    x, y = load_whas500()
    risk = x.astype(float)[list(WHAS500_WEIGHTS)].to_numpy() @ np.array(list(WHAS500_WEIGHTS.values()))
    found = concordance(y["lenfol"], y["fstat"], risk)
    assert (found.concordant, found.discordant, found.tied_risk, found.tied_time) == (57849, 17300, 0, 14)
    assert found.cindex == pytest.approx(0.7697907, abs=5e-8)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), size=st.integers(4, 60), decimals=st.integers(-1, 2))
def test_harrell_equals_lifelines_ties_included(seed: int, size: int, decimals: int) -> None:
    time, event, risk = cohort(size, seed, decimals=decimals)
    time, risk = np.abs(time), risk.round(1)
    try:
        expected = concordance_index(time, -risk, event)
    except ZeroDivisionError:
        with pytest.raises(UndefinedMetricError):
            concordance(time, event, risk)
        return
    assert concordance(time, event, risk).cindex == pytest.approx(expected, abs=1e-12)


def test_uno_equals_harrell_without_censoring() -> None:
    time, _, risk = cohort(150)
    event = np.ones(150, dtype=bool)
    assert uno_cindex(Training(time, event), time, event, risk) == pytest.approx(
        concordance(time, event, risk).cindex, abs=1e-12
    )


def test_uno_does_not_depend_on_censoring_as_harrell_does() -> None:
    time, _, risk = cohort(4000, seed=3, censoring=1e9)
    truth = concordance(time, np.ones(4000, bool), risk).cindex
    seen, event, risk = cohort(4000, seed=3, censoring=25.0)
    training = Training(seen, event)
    uno = uno_cindex(training, seen, event, risk)
    assert abs(uno - truth) < abs(concordance(seen, event, risk).cindex - truth)


def test_auc_does_not_depend_on_order_and_is_plain_without_censoring() -> None:
    time, _, risk = cohort(300)
    event = np.ones(300, dtype=bool)
    training = Training(time, event)
    months = [36.0, 12.0, 60.0, 5.0]
    found = auc_at(training, time, event, risk, months)
    plain = [np.mean(risk[time <= m][:, None] > risk[time > m][None, :]) for m in months]
    np.testing.assert_allclose(found, plain, atol=1e-12)
    np.testing.assert_allclose(auc_at(training, time, event, risk, sorted(months)), np.array(found)[[3, 1, 0, 2]])


def test_times_beyond_training_follow_up() -> None:
    time, event, risk = cohort(200)
    early = time < 20
    training = Training(time[early], event[early])
    limit = training.truncation_months
    assert limit <= 20
    assert np.isfinite(uno_cindex(training, time, event, risk))
    auc = auc_at(training, time, event, risk, [limit / 2, limit, 60.0])
    assert np.isfinite(auc[0])
    assert np.isnan(auc[1:]).all()
    assert brier_times(training, time, 60.0)[-1] <= limit


def test_scores_are_defined_with_event_and_censoring_at_the_last_time() -> None:
    """Ties at times in months make the censoring survival 0 at the last time, so the scores end before it."""
    training = Training(np.array([5, 10, 15, 20, 25, 30, 40, 60, 60.0]), np.array([1, 1, 1, 0, 1, 1, 1, 1, 0], bool))
    assert training.truncation_months == 40
    time, event = np.array([4, 12, 22, 33, 60, 60, 70.0]), np.array([1, 1, 0, 1, 1, 0, 0], dtype=bool)
    found = auc_at(training, time, event, -time, [12, 36, 50])
    np.testing.assert_array_equal(found, [1, 1, np.nan])
    assert uno_cindex(training, time, event, -time) == 1


def test_weighted_scores_are_undefined_where_everyone_is_censored() -> None:
    training = Training(np.full(29, 5.0), np.arange(29) == 0)
    time, event, risk = cohort(40)
    assert np.isnan(training.truncation_months)
    assert np.isnan(uno_cindex(training, time, event, risk))
    assert np.isnan(auc_at(training, time, event, risk, [3.0, 12.0])).all()
    assert not len(brier_times(training, time, 4.0))


def brute_force(
    training: Training, time: np.ndarray, event: np.ndarray, risk: np.ndarray, months: float
) -> list[float]:
    """Compute Uno's C and the AUC from their definitions, pair by pair, with lifelines' censoring model, G(t-)."""
    # An event at the time of a censoring comes first, since the patient was still at risk of being censored.
    later = training.time + np.where(training.event, 0, 1e-6)
    curve = lifelines.KaplanMeierFitter().fit(later, ~training.event)
    g = {t: float(curve.predict(t - 1e-6)) for t in time.tolist()}
    limit = training.truncation_months
    uno, auc = np.zeros(2), np.zeros(2)
    for i in np.flatnonzero(event):
        for j in range(len(time)):
            won = np.array([float(risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j]), 1.0])
            if time[i] < limit and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                uno += won / g[time[i]] ** 2
            if time[i] <= months < min(time[j], limit):
                auc += won / g[time[i]]
    return [uno[0] / uno[1], auc[0] / auc[1]]


@pytest.mark.parametrize("seed", range(3))
def test_weighted_scores_match_their_definitions(seed: int) -> None:
    data = cohort(150, seed, decimals=0)
    time, event, risk = data[0] + 1, data[1], data[2].round(1)
    training = Training(time[50:], event[50:])
    expected = brute_force(training, time[:50], event[:50], risk[:50], 12.0)
    assert uno_cindex(training, time[:50], event[:50], risk[:50]) == pytest.approx(expected[0], abs=1e-9)
    assert auc_at(training, time[:50], event[:50], risk[:50], [12.0])[0] == pytest.approx(expected[1], abs=1e-9)


def test_brier_equals_scikit_survival_within_follow_up() -> None:
    time, event, risk = cohort(300)
    training = Training(time, event)
    edges = np.array([5.0, 10.0, 20.0])
    survival = np.exp(-np.outer(np.exp(risk), edges / 30))
    times = edges
    expected = integrated_brier_score(Surv.from_arrays(event, time), training.truncated(time, event), survival, edges)
    found = integrated_brier(training, time, event, survival, times)
    assert found == pytest.approx(expected, abs=1e-12)
    null = integrated_brier(training, time, event, training.survival_at(times), times)
    assert found < null
    curve = lifelines.KaplanMeierFitter().fit(time, event)
    np.testing.assert_allclose(training.survival_at(times), curve.predict(times), atol=1e-6)
    assert np.isnan(integrated_brier(training, time, event, survival[:, :1], times[:1]))


def test_the_brier_score_ends_where_a_tenth_is_at_risk() -> None:
    time, event, _ = cohort(300)
    training = Training(time, event)
    times = brier_times(training, time, 500.0)
    assert times[0] == time.min()
    assert (time >= times[-1]).sum() == 30
    assert (np.diff(times) > 0).all()
    assert brier_times(training, time, 7.5)[-1] == 7.5  # the model predicts no later
    early = Training(np.minimum(time, 10), event & (time < 10))
    assert brier_times(early, time, 500.0)[-1] <= 10
    for few in ([3.0, 3.0, 3.0], [5.0], [4.0, 4.0, 9.0]):
        assert not len(brier_times(training, np.array(few), 500.0)), few
    assert not len(brier_times(training, time, time.min()))
    last_two = brier_times(training, np.array([1.0, 2.0, 7.0, 7.0]), 500.0)
    assert last_two[-1] == 2.0  # a time at which follow-up of all has ended has no Brier score


def test_risks_are_tied_only_if_they_are_equal() -> None:
    """The scale of a risk has no meaning: differences of 1e-12 order patients as those of 1 do."""
    time, event, risk = cohort(150, decimals=0)
    time, risk = time + 1, risk.round(1)
    training, ones = Training(time, event), np.ones((1, 150), np.float32)
    for factor in (1e-12, 1e12):
        scaled = risk * factor
        assert concordance(time, event, scaled) == concordance(time, event, risk)
        assert uno_cindex(training, time, event, scaled) == uno_cindex(training, time, event, risk)
        months = [5.0, 20.0]
        np.testing.assert_array_equal(
            auc_at(training, time, event, scaled, months), auc_at(training, time, event, risk, months)
        )
        np.testing.assert_array_equal(
            Resamples(time, event, ones).cindex(scaled), Resamples(time, event, ones).cindex(risk)
        )


@pytest.mark.parametrize(
    ("time", "event", "risk"),
    [
        ([1, 2, 3], [0, 0, 0], [1, 2, 3]),
        ([5, 5, 5], [1, 1, 1], [1, 2, 3]),
        ([1, 2, 3], [0, 0, 1], [1, 2, 3]),
        ([4], [1], [1]),
        ([], [], []),
    ],
)
def test_no_comparable_pair_is_an_error(time: list, event: list, risk: list) -> None:
    with pytest.raises(UndefinedMetricError, match="no comparable pair"):
        concordance(time, event, risk)


@pytest.mark.parametrize(
    ("time", "event", "risk", "message"),
    [
        ([1, 2], [1, 0], [np.nan, 1], "1 of 2 values of risk are not finite"),
        ([1, np.inf], [1, 0], [0, 1], "values of time are not finite"),
        ([-1, 2], [1, 0], [0, 1], "a time is negative"),
        ([1, 2], [1, 2], [0, 1], "events hold values other than 0 and 1"),
        ([1, 2, 3], [1, 0], [0, 1], "differ in length"),
    ],
)
def test_invalid_arrays(time: list, event: list, risk: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        concordance(time, event, risk)


def test_constant_risk_counts_every_pair_as_tied() -> None:
    time, event, _ = cohort(50)
    found = concordance(time, event, np.zeros(50))
    assert found.cindex == 0.5
    assert found.concordant == found.discordant == 0
    assert found.tied_risk > 0


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), size=st.integers(5, 40))
def test_bootstrap_replicates_are_exact(seed: int, size: int) -> None:
    """Every replicate equals the C-index of the drawn patients, computed one by one."""
    time, event, risk = cohort(size, seed, decimals=0)
    risk = risk.round(1)
    assume(event.any() and np.ptp(time) > 0)
    resamples = Resamples.draw(time, event, replicates=10, seed=seed)
    for counts, value in zip(resamples.counts, resamples.cindex(risk), strict=True):
        assert counts.sum() == size
        rows = np.repeat(np.arange(size), counts.astype(int))
        if np.isnan(value):
            with pytest.raises(UndefinedMetricError):
                concordance(time[rows], event[rows], risk[rows])
        else:
            assert concordance(time[rows], event[rows], risk[rows]).cindex == pytest.approx(value, abs=1e-12)


def test_pairs_within_folds() -> None:
    time, event, risk = cohort(90)
    fold = np.arange(90) % 3
    once = Resamples(time, event, np.ones((1, 90), dtype=np.float32))
    parts = [concordance(time[fold == k], event[fold == k], risk[fold == k]) for k in range(3)]
    pairs = [p.concordant + p.discordant + p.tied_risk for p in parts]
    expected = np.average([p.cindex for p in parts], weights=pairs)
    assert once.cindex(risk, within=fold)[0] == pytest.approx(expected, abs=1e-12)
    # The scale of a fold's risks does not matter within folds, but does when pooled.
    assert once.cindex(risk + 10 * fold, within=fold)[0] == pytest.approx(expected, abs=1e-12)


def bootstrap_cindex(time, event, risk, *, replicates: int, seed: int) -> tuple[float, float]:
    """95% percentile interval of Harrell's C over resampled patients."""
    return percentile_interval(Resamples.draw(time, event, replicates=replicates, seed=seed).cindex(risk))


def test_interval_covers_and_repeats() -> None:
    time, event, risk = cohort(300)
    low, high = bootstrap_cindex(time, event, risk, replicates=400, seed=1)
    assert low < concordance(time, event, risk).cindex < high
    assert (low, high) == bootstrap_cindex(time, event, risk, replicates=400, seed=1)
    wide = bootstrap_cindex(time[:60], event[:60], risk[:60], replicates=400, seed=1)
    assert wide[1] - wide[0] > high - low
    with pytest.raises(UndefinedMetricError, match="have no comparable pair"):
        bootstrap_cindex([1.0, 1.0], [True, True], [0.0, 1.0], replicates=20, seed=1)


def test_interval_of_a_cross_validation_is_wider_than_that_of_its_models() -> None:
    time, event, risk = cohort(300)
    draws = Resamples.draw(time, event, replicates=400, seed=1)
    value, spread = concordance(time, event, risk).cindex, draws.cindex(risk)
    single, several = (cross_validated_interval(value, spread, folds=folds) for folds in (1, 5))
    assert several[0] < single[0] < value < single[1] < several[1]
    plain = cross_validated_interval(value, spread, folds=5, bounded=False)
    assert plain[1] - plain[0] == pytest.approx(2 * 1.959964 * np.sqrt(CROSS_VALIDATION) * spread.std(), rel=1e-6)
    assert cross_validated_interval(0.999, np.array([0.9, 1.0, 0.95]))[1] <= 1
    assert np.isnan(cross_validated_interval(0.7, None)).all()
    assert np.isnan(cross_validated_interval(0.7, np.array([np.nan, np.nan, 0.6]))).all()
    assert cross_validated_p(0.1, np.array([0.05, 0.15]), folds=1) == pytest.approx(0.0455, abs=1e-3)
    assert cross_validated_p(0.0, np.zeros(5)) == 1.0


def test_interval_has_its_nominal_coverage() -> None:
    time, event, risk = cohort(20_000, seed=9)
    truth = concordance(time[:4000], event[:4000], risk[:4000]).cindex
    hits = 0
    for start in range(0, 20_000, 200):
        part = slice(start, start + 200)
        low, high = bootstrap_cindex(time[part], event[part], risk[part], replicates=200, seed=start)
        hits += low <= truth <= high
    assert 86 <= hits <= 100
