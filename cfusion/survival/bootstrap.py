"""Patient-bootstrap replicates of the C-index, exact and vectorised.

A replicate draws as many patients as the cohort has, with replacement. Its C depends only on how often each patient was
drawn. With counts w, the concordant pairs are w' S w and the comparable pairs w' P w. P[i, j] is 1 if i's event came
before j's time; S[i, j] is 1 if i also had the higher risk. All replicates then take two matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from cfusion.errors import UndefinedMetricError

CROSS_VALIDATION = 1.5
"""Variance of a cross-validated score, relative to that of its trained models on resampled patients.

The folds are not independent: fold j trains the model that scores fold k, and the other way round. Where the models
learn nothing but noise, each pair of folds therefore counts twice and the factor is 2; where they learn only signal,
it is 1. `python -m benchmarks.coverage` measures the coverage and the type-I error with 1.5.
"""

FEW_EVENTS = 50
"""Below this number of events no interval can be trusted; the same benchmark shows how far it is off."""

_NORMAL = 1.959964
_BLOCK_ENTRIES = 1 << 23


@dataclass(frozen=True, eq=False)
class Resamples:
    """One set of bootstrap draws over the patients of a cohort; sharing it between models makes comparisons paired.

    Attributes:
        time: [case], months.
        event: [case], true where the event happened.
        counts: [replicate, case], how often each patient was drawn.
        weight: [case], weight of the pairs opened by a patient's event, as in Uno's C; None: 1, Harrell's C.
    """

    time: np.ndarray
    event: np.ndarray
    counts: np.ndarray
    weight: np.ndarray | None = None
    _comparable: dict[bytes, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def draw(
        cls, time: ArrayLike, event: ArrayLike, *, replicates: int, seed: int, strata: ArrayLike | None = None
    ) -> Resamples:
        """Draw the replicates; the order of the patients decides who is drawn, so give it a fixed one.

        Args:
            time: [case], months.
            event: [case].
            replicates: Number of draws.
            seed: Seed of the draws.
            strata: [case]; each draw keeps the number of patients of every stratum. None: one stratum.
        """
        time, event = np.asarray(time, dtype=float), np.asarray(event, dtype=bool)
        counts = np.zeros((replicates, len(time)), dtype=np.float32)
        names = np.zeros(len(time)) if strata is None else np.asarray(strata)
        generator = np.random.default_rng(seed)
        for name in dict.fromkeys(names):
            rows = np.flatnonzero(names == name)
            counts[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=replicates)
        return cls(time, event, counts)

    def of(self, rows: np.ndarray) -> Resamples:
        """Return the same draws of some of the patients, [row], in another order if need be."""
        return Resamples(self.time[rows], self.event[rows], self.counts[:, rows])

    def cindex(self, risk: ArrayLike, within: ArrayLike | None = None) -> np.ndarray:
        """Return the C-index of each replicate, [replicate]; NaN where a replicate has no comparable pair.

        Args:
            risk: [case], higher is worse.
            within: [case] or None; if given, only pairs with equal values (the same fold) count.
        """
        groups = None if within is None else np.unique(within, return_inverse=True)[1]
        key = b"" if groups is None else groups.tobytes()
        if key not in self._comparable:
            self._comparable[key] = self._weighted_pairs(None, groups)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._weighted_pairs(np.asarray(risk, dtype=float), groups) / self._comparable[key]

    def _weighted_pairs(self, risk: np.ndarray | None, groups: np.ndarray | None) -> np.ndarray:
        """Count the concordant pairs of every replicate; without risks, the comparable pairs."""
        total = np.zeros(len(self.counts))
        for level in (None,) if groups is None else np.unique(groups):
            members = np.arange(len(self.time)) if level is None else np.flatnonzero(groups == level)
            rows = members[self.event[members]]
            step = max(1, _BLOCK_ENTRIES // max(len(members), 1))
            for start in range(0, len(rows), step):
                block = rows[start : start + step]
                pairs = self._pairs(block, members, risk)
                drawn = self.counts[:, members] @ pairs.T
                weight = self.counts[:, block] if self.weight is None else self.counts[:, block] * self.weight[block]
                total += np.einsum("rb,rb->r", drawn, weight, dtype=float)
        return total

    def _pairs(self, rows: np.ndarray, members: np.ndarray, risk: np.ndarray | None) -> np.ndarray:
        """Return [row, member]: 1 for a comparable pair; with risks, 1 if also concordant and ½ if tied."""
        earlier, later = self.time[rows, None], self.time[None, members]
        comparable = (earlier < later) | ((earlier == later) & ~self.event[None, members])
        if risk is None:
            return comparable.astype(np.float32)
        difference = risk[rows, None] - risk[None, members]
        concordant = (difference > 0) + np.float32(0.5) * (difference == 0)
        return concordant.astype(np.float32) * comparable


def cross_validated_interval(
    value: float, replicates: np.ndarray | None, *, folds: int = 2, bounded: bool = True
) -> tuple[float, float]:
    """Return the 95% interval of a score over a complete cross-validation, for the procedure that trained its models.

    The replicates resample patients and keep the trained models; `CROSS_VALIDATION` widens their variance.

    Args:
        value: The score.
        replicates: [replicate]; None: no interval.
        folds: Number of folds; with one, nothing is widened.
        bounded: Whether the score lies between 0 and 1; its interval then is symmetric on the logit scale.

    Returns:
        NaN without an interval: no replicates, or half of them undefined.
    """
    error = _error(value, replicates, folds)
    if np.isnan(error) or error == 0:
        return (value, value) if error == 0 else (float("nan"), float("nan"))
    if not bounded or not 0 < value < 1:
        return value - _NORMAL * error, value + _NORMAL * error
    centre, margin = np.log(value / (1 - value)), _NORMAL * error / (value * (1 - value))
    low, high = (float(1 / (1 + np.exp(-(centre + sign * margin)))) for sign in (-1, 1))
    return low, high


def cross_validated_p(difference: float, replicates: np.ndarray | None, *, folds: int = 2) -> float:
    """Return the two-sided p-value that a difference over a complete cross-validation is 0; NaN without replicates."""
    error = _error(difference, replicates, folds)
    if error == 0:
        return 1.0
    return float(2 * norm.sf(abs(difference) / error))


def _error(value: float, replicates: np.ndarray | None, folds: int) -> float:
    if replicates is None or np.isnan(value):
        return float("nan")
    finite = replicates[np.isfinite(replicates)]
    if len(finite) * 2 < len(replicates) or not len(finite):
        return float("nan")
    return float(finite.std() * np.sqrt(CROSS_VALIDATION if folds > 1 else 1.0))


def percentile_interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval of the finite replicates.

    Raises:
        UndefinedMetricError: Fewer than half of the replicates are finite.
    """
    finite = replicates[np.isfinite(replicates)]
    if len(finite) * 2 < len(replicates) or not len(finite):
        raise UndefinedMetricError(
            f"{len(replicates) - len(finite)} of {len(replicates)} bootstrap replicates have no comparable pair."
        )
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
