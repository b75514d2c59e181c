"""Patient-bootstrap replicates of Harrell's C, exact and vectorised.

A replicate draws as many patients as there are, with replacement. Its C depends on how often each patient was drawn
alone: with counts w, the concordant pairs are w' S w and the comparable ones w' P w, where P[i, j] says that i's event
came before j's time and S[i, j] whether i had the higher risk. All replicates are then two matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from cfusion.errors import UndefinedMetricError

_BLOCK_ENTRIES = 1 << 23


@dataclass(frozen=True)
class Resamples:
    """One set of bootstrap draws over the patients of a cohort, shared by all models so that they compare in pairs.

    Attributes:
        time: [case], months.
        event: [case], true where the event happened.
        counts: [replicate, case], how often each patient was drawn.
        stratum: [case] or None; with it, pairs count within a stratum (a fold) alone.
    """

    time: np.ndarray
    event: np.ndarray
    counts: np.ndarray
    stratum: np.ndarray | None = None
    _comparable: np.ndarray = field(init=False, repr=False)

    @classmethod
    def draw(
        cls, time: ArrayLike, event: ArrayLike, *, replicates: int, seed: int, stratum: ArrayLike | None = None
    ) -> Resamples:
        """Draw the replicates; within strata, so that every fold keeps its size."""
        time, event = np.asarray(time, dtype=float), np.asarray(event, dtype=bool)
        strata = np.zeros(len(time), dtype=int) if stratum is None else np.unique(stratum, return_inverse=True)[1]
        generator = np.random.default_rng(seed)
        counts = np.zeros((replicates, len(time)), dtype=np.float32)
        for level in np.unique(strata):
            rows = np.flatnonzero(strata == level)
            counts[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=replicates)
        return cls(time, event, counts, None if stratum is None else strata)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_comparable", self._weighted_pairs(None))

    def cindex(self, risk: ArrayLike) -> np.ndarray:
        """[replicate], Harrell's C of each replicate; NaN where it has no comparable pair."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._weighted_pairs(np.asarray(risk, dtype=float)) / self._comparable

    def _weighted_pairs(self, risk: np.ndarray | None) -> np.ndarray:
        """Concordant pairs of every replicate, or comparable ones without risks."""
        total = np.zeros(len(self.counts))
        rows = np.flatnonzero(self.event)
        step = max(1, _BLOCK_ENTRIES // max(len(self.time), 1))
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            pairs = self._pairs(block)
            if risk is not None:
                difference = risk[block, None] - risk[None, :]
                # 1e-8 is scikit-survival's tolerance for ties
                pairs = pairs * np.where(
                    np.abs(difference) <= 1e-8, np.float32(0.5), (difference > 0).astype(np.float32)
                )
            total += np.einsum("rb,rb->r", self.counts @ pairs.T, self.counts[:, block], dtype=float)
        return total

    def _pairs(self, rows: np.ndarray) -> np.ndarray:
        later = self.time[rows, None] < self.time[None, :]
        tied_censored = (self.time[rows, None] == self.time[None, :]) & ~self.event[None, :]
        pairs = later | tied_censored
        if self.stratum is not None:
            pairs &= self.stratum[rows, None] == self.stratum[None, :]
        return pairs.astype(np.float32)


def percentile_interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central interval of the finite replicates.

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


def bootstrap_cindex(
    time: ArrayLike, event: ArrayLike, risk: ArrayLike, *, replicates: int, seed: int, fold: ArrayLike | None = None
) -> tuple[float, float]:
    """95% percentile interval of Harrell's C over resampled patients.

    Args:
        time: [case], months.
        event: [case], true where the event happened.
        risk: [case], higher is worse.
        replicates: Number of resamples.
        seed: Of the draws.
        fold: [case] or None; with it, patients are drawn and compared within a fold alone.

    Raises:
        UndefinedMetricError: Most replicates have no comparable pair.
    """
    resamples = Resamples.draw(time, event, replicates=replicates, seed=seed, stratum=fold)
    return percentile_interval(resamples.cindex(risk))
