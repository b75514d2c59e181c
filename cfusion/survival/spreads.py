"""Patient-bootstrap replicates of the censoring-weighted scores: Uno's C, time-dependent AUC, Brier.

The censoring model is estimated on the training patients and is the same for every replicate. Each replicate's score is
therefore a ratio of sums weighted by the draws' counts: exact, with one matrix product for all replicates.
"""

from __future__ import annotations

import numpy as np

from cfusion.survival.bootstrap import Resamples
from cfusion.survival.metrics import Training


def uno_replicates(
    training: Training, time: np.ndarray, event: np.ndarray, risk: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return Uno's C of each replicate, [replicate] (see `cfusion.survival.metrics.uno_cindex`); NaN if undefined.

    Args:
        training: Gives the censoring model and the truncation time.
        time: [case], months.
        event: [case], true where the event happened.
        risk: [case], higher is worse.
        counts: [replicate, case], how often each patient was drawn.
    """
    limit = training.truncation_months
    seen, followed = event & (time <= limit), np.minimum(time, limit)
    weight = np.zeros(len(time))
    early = seen & (followed < limit)
    if not early.any():
        return np.full(len(counts), np.nan)
    weight[early] = training.uncensored_before(followed[early]) ** -2.0
    return Resamples(followed, seen, counts, weight).cindex(risk)


def auc_replicates(
    training: Training, time: np.ndarray, event: np.ndarray, risk: np.ndarray, counts: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """Return the cumulative/dynamic AUC of each replicate, [replicate, time] (see `auc_at`); NaN if undefined."""
    limit = training.truncation_months
    found = np.full((len(counts), len(times)), np.nan)
    wins = ((risk[:, None] > risk[None]) + 0.5 * (risk[:, None] == risk[None])).astype(np.float32)
    for column, month in enumerate(times):
        case, control = event & (time <= month), np.minimum(time, limit) > month
        if month >= limit or not case.any() or not control.any():
            continue
        drawn = counts[:, case] / training.uncensored_before(time[case])
        controls = counts[:, control]
        won = np.einsum("rc,rc->r", drawn, controls @ wins[np.ix_(case, control)].T)
        with np.errstate(invalid="ignore", divide="ignore"):
            found[:, column] = won / (drawn.sum(axis=1) * controls.sum(axis=1))
    return found


def brier_replicates(
    training: Training, time: np.ndarray, event: np.ndarray, survival: np.ndarray, counts: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """Return the integrated Brier score of each replicate, [replicate] (see `integrated_brier`); NaN with < 2 times.

    Args:
        training: Gives the censoring model and the truncation time.
        time: [case], months.
        event: [case], true where the event happened.
        survival: [case, time], predicted survival.
        counts: [replicate, case], how often each patient was drawn.
        times: [time], months, from `brier_times`.
    """
    if len(times) < 2:
        return np.full(len(counts), np.nan)
    limit = training.truncation_months
    seen, followed = event & (time <= limit), np.minimum(time, limit)
    died = (followed[:, None] <= times) & seen[:, None]
    alive = followed[:, None] > times
    # Only weights of events are used; at a censored patient's time the censoring survival may be 0.
    at_death = np.where(seen, training.uncensored_before(np.where(seen, followed, 0.0)), 1.0)
    errors = survival**2 * died / at_death[:, None] + (1 - survival) ** 2 * alive / training.uncensored_at(times)
    integrated = np.trapezoid(errors, times, axis=1) / (times[-1] - times[0])
    with np.errstate(invalid="ignore"):  # a draw may leave a small fold without patients
        return counts @ integrated / counts.sum(axis=1)
