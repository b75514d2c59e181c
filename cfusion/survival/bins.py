"""Time bins of the discrete hazard, fitted on the training patients (`train.published_errors`: on all)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cfusion.errors import DataError


@dataclass(frozen=True)
class TimeBins:
    """Left-closed intervals of the follow-up time, each with one hazard.

    Attributes:
        edges: `n_bins` + 1 increasing times in months: 0, the inner quantiles of the event times, and a value just
            above the longest time used for fitting. The outer bins are open, so every time has a label.
    """

    edges: tuple[float, ...]

    @classmethod
    def fit(cls, time_months: ArrayLike, event: ArrayLike, n_bins: int) -> TimeBins:
        """Place the edges at quantiles of the event times and widen the outer ones (CrossFusion program; MCAT, sec. 4).

        Args:
            time_months: [case], ≥ 0.
            event: [case], true where the event was seen.
            n_bins: Number of bins, ≥ 2.

        Raises:
            DataError: There are fewer distinct event times than bins, or ties make quantiles coincide.
        """
        time = np.asarray(time_months, dtype=float)
        happened = time[np.asarray(event, dtype=bool)]
        distinct = len(np.unique(happened))
        if distinct < n_bins:
            raise DataError(
                f"{distinct} distinct event times among {len(time)} training patients cannot fill {n_bins} time bins.",
                "Set evaluation.n_bins lower.",
            )
        inner = np.quantile(happened, np.arange(1, n_bins) / n_bins)
        edges = np.concatenate([[0.0], inner, [time.max() + 1e-4]])
        if (np.diff(edges) <= 0).any():
            raise DataError(
                f"the quantiles of {len(happened)} event times coincide ({', '.join(f'{e:g}' for e in inner)} months).",
                "Set evaluation.n_bins lower.",
            )
        return cls(tuple(float(edge) for edge in edges))

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return len(self.edges) - 1

    @property
    def right_edges_months(self) -> tuple[float, ...]:
        """Times at which the predicted survival S_1 … S_K applies."""
        return self.edges[1:]

    def label(self, time_months: ArrayLike) -> np.ndarray:
        """Return the bin of each time, 0 … n_bins − 1; times beyond the outer edges fall into the outer bins."""
        return np.searchsorted(self.edges[1:-1], np.asarray(time_months, dtype=float), side="right").astype(np.int64)
