"""Replicates of the censoring-weighted scores equal scikit-survival's scores of the drawn patients."""

import numpy as np
import pytest

from cfusion.survival.metrics import Training, auc_at, brier_times, integrated_brier, uno_cindex
from cfusion.survival.spreads import auc_replicates, brier_replicates, uno_replicates

HORIZONS = np.array([6.0, 18.0, 30.0, 500.0])
EDGES = np.array([5.0, 12.0, 20.0, 33.0, 45.0])


@pytest.fixture(scope="module")
def fold():
    generator = np.random.default_rng(3)

    def outcomes(n):
        truth = generator.normal(size=n)
        dies, leaves = generator.exponential(30 * np.exp(-truth)), generator.exponential(30, n)
        # Times in full months make ties in time; rounding makes ties in risk.
        time = np.ceil(np.minimum(dies, leaves))
        return time, dies < leaves, np.round(truth + generator.normal(size=n), 1)

    time, event, risk = outcomes(70)
    training = Training(*outcomes(150)[:2])
    counts = generator.multinomial(70, np.full(70, 1 / 70), size=40).astype(np.float32)
    counts[0] = 1
    survival = np.exp(-np.outer(np.exp(risk), EDGES / 40))
    return training, time, event, risk, survival, counts


def drawn(counts, *arrays):
    rows = np.repeat(np.arange(len(counts)), counts.astype(int))
    return [array[rows] for array in arrays]


def test_uno(fold):
    training, time, event, risk, _, counts = fold
    found = uno_replicates(training, time, event, risk, counts)
    expected = [uno_cindex(training, *drawn(row, time, event, risk)) for row in counts]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_auc(fold):
    training, time, event, risk, _, counts = fold
    found = auc_replicates(training, time, event, risk, counts, HORIZONS)
    expected = [auc_at(training, *drawn(row, time, event, risk), HORIZONS) for row in counts]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isnan(found[:, -1]).all()
    assert np.isfinite(found[:, 1]).all()


def test_brier(fold):
    training, time, event, _, survival, counts = fold
    times = EDGES[brier_times(training, time, 500.0)[-1] >= EDGES]
    assert len(times) >= 3
    kept = survival[:, : len(times)]
    found = brier_replicates(training, time, event, kept, counts, times)
    expected = []
    for row in counts:
        chosen = drawn(row, time, event, kept)
        # scikit-survival refuses times past the last follow-up of the drawn patients, which can happen in a replicate.
        if chosen[0].max() <= times[-1] or chosen[0].min() > times[0]:
            expected.append(np.nan)
        else:
            expected.append(integrated_brier(training, *chosen, times))
    known = np.isfinite(expected)
    assert known.sum() > 20
    np.testing.assert_allclose(found[known], np.array(expected)[known], rtol=1e-6)


def test_too_few_times_have_no_brier_score(fold):
    training, time, event, _, survival, counts = fold
    assert np.isnan(brier_replicates(training, time, event, survival[:, :1], counts, EDGES[:1])).all()
