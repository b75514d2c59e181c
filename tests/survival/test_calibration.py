"""Calibration: correct predictions pass, and wrong ones are detected."""

import numpy as np
import pytest

from cfusion.errors import UndefinedMetricError
from cfusion.survival.calibration import (
    calibration_intercept,
    calibration_points,
    calibration_slope,
    d_calibration,
    integrated_calibration_index,
    observed_over_expected,
    survival_at,
)


def drawn(size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return times, events and the true hazard rate of each patient."""
    generator = np.random.default_rng(seed)
    rate = np.exp(generator.normal(size=size)) / 30
    happens, leaves = generator.exponential(1 / rate), generator.exponential(60, size)
    return np.minimum(happens, leaves), happens < leaves, rate


def test_interpolation() -> None:
    survival, edges = np.array([[0.8, 0.4]]), np.array([[10.0, 30.0]])
    for months, expected in ((0, 1.0), (5, 0.9), (10, 0.8), (20, 0.6), (30, 0.4), (99, 0.4)):
        assert survival_at(survival, edges, np.array([months]))[0] == pytest.approx(expected)


def test_d_calibration_by_hand() -> None:
    """Ten events, one in each tenth, are perfectly calibrated; ten in the same tenth are not."""
    uniform = (np.arange(10) + 0.5) / 10
    assert d_calibration(np.ones(10, bool), uniform) == pytest.approx(1.0)
    assert d_calibration(np.ones(100, bool), np.full(100, 0.55)) < 1e-12
    # a patient censored at survival 1 is spread evenly
    assert d_calibration(np.zeros(7, bool), np.ones(7)) == pytest.approx(1.0)


def test_d_calibration_detects_overconfidence() -> None:
    rejected = 0
    for seed in range(60):
        time, event, rate = drawn(300, seed)
        rejected += d_calibration(event, np.exp(-rate * time)) < 0.05
        assert d_calibration(event, np.exp(-3 * rate * time)) < 0.01
    assert rejected <= 6


def test_slope_is_one_for_the_truth_and_less_for_extremes() -> None:
    time, event, rate = drawn(2000, 1)
    fold = np.arange(2000) % 5
    slope, low, high = calibration_slope(time, event, np.exp(-rate * 20), fold)
    assert low < 1 < high
    assert abs(slope - 1) < 0.15
    extreme = np.exp(-20 / 30 * (30 * rate) ** 2)
    assert calibration_slope(time, event, extreme, fold)[2] < 0.7
    with pytest.raises(UndefinedMetricError):
        calibration_slope(time, event, np.full(2000, 0.5), fold)


def test_points_lie_on_the_diagonal_for_the_truth() -> None:
    time, event, rate = drawn(3000, 2)
    predicted = {months: np.exp(-rate * months) for months in (12.0, 24.0, 9999.0)}
    points = calibration_points(time, event, predicted, predicted[24.0])
    assert list(points) == [12.0, 24.0]
    for found in points.values():
        assert len(found) == 5
        assert sum(point.size for point in found) == 3000
        for point in found:
            assert point.low - 0.02 < point.predicted < point.high + 0.02


def test_tied_predictions_form_one_group() -> None:
    time, event, _ = drawn(300, 2)
    constant = np.full(300, 0.5)
    ((point,),) = calibration_points(time, event, {24.0: constant}, constant).values()
    assert point.size == 300


def test_the_mean_is_right_for_the_truth_and_wrong_for_three_times_the_deaths() -> None:
    time, event, rate = drawn(2000, 3)
    for factor in (1, 3):
        survival = np.exp(-factor * rate * 12)
        ratio, low, high = observed_over_expected(time, event, survival, 12)
        intercept = calibration_intercept(event, factor * rate * time)
        assert (low < 1 < high) == (factor == 1)
        assert (intercept[1] < 0 < intercept[2]) == (factor == 1)
        assert (integrated_calibration_index(time, event, survival, 12) < 0.03) == (factor == 1)
        assert low < ratio < high


@pytest.mark.filterwarnings("error")
def test_the_mean_of_few_or_separated_patients_is_undefined_or_finite() -> None:
    time = np.arange(1.0, 13)
    for event in (np.zeros(12, bool), time > 11):
        with pytest.raises(UndefinedMetricError):
            integrated_calibration_index(time, event, np.linspace(0.1, 0.9, 12), 6)
        with pytest.raises(UndefinedMetricError):
            observed_over_expected(time, event, np.linspace(0.1, 0.9, 12), 6)
    with pytest.raises(UndefinedMetricError):
        calibration_intercept(np.zeros(12, bool), np.ones(12))
    for survival in (np.full(12, 0.5), np.where(time < 6, 0.01, 0.99), np.repeat([0.2, 0.8], 6)):
        try:
            assert 0 <= integrated_calibration_index(time, time < 6, survival, 6) <= 1
        except UndefinedMetricError:
            continue
