"""Patient-bootstrap replicates of the C-index, exact and vectorised.

A replicate draws as many patients as the cohort has, with replacement. Its C depends only on how often each patient was
drawn. With counts w, the concordant pairs are w' S w and the comparable pairs w' P w. P[i, j] is 1 if i's event came
before j's time; S[i, j] is 1 if i also had the higher risk. All replicates then take two matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from cfusion.errors import UndefinedMetricError

TIED_RISK = 1e-8
"""Risks that differ by at most this are tied and count half, as in scikit-survival."""

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
        cls, time: ArrayLike, event: ArrayLike, *, replicates: int, seed: int, stratum: ArrayLike | None = None
    ) -> Resamples:
        """Draw the replicates; strata (folds) are drawn separately, so each keeps its size."""
        time, event = np.asarray(time, dtype=float), np.asarray(event, dtype=bool)
        strata = np.zeros(len(time), dtype=int) if stratum is None else np.asarray(stratum)
        generator = np.random.default_rng(seed)
        counts = np.zeros((replicates, len(time)), dtype=np.float32)
        for level in np.unique(strata):
            rows = np.flatnonzero(strata == level)
            counts[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=replicates)
        return cls(time, event, counts)

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
        concordant = (difference > TIED_RISK) + np.float32(0.5) * (np.abs(difference) <= TIED_RISK)
        return concordant.astype(np.float32) * comparable


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
