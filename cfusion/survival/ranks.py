"""Ranks methods over data sets: Friedman's test, and Nemenyi's critical difference between mean ranks.

After Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets (JMLR 7, 2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from cfusion.errors import DataError

_NAN = float("nan")


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of methods over data sets; 1 is best.

    Attributes:
        names: Methods, best first.
        mean_ranks: Mean rank of each method.
        blocks: Number of data sets.
        p: P-value of Friedman's test, corrected for ties, that all methods rank alike; NaN with fewer than 3 methods,
            fewer than 2 data sets, or only ties.
        critical_difference: Mean ranks that differ by less are not significantly different (Nemenyi, two-sided,
            level .05); NaN with fewer than 2 data sets.
        cliques: Longest runs of methods without a significant difference, as names, best first; at least 2 methods.
    """

    names: tuple[str, ...]
    mean_ranks: tuple[float, ...]
    blocks: int
    p: float
    critical_difference: float
    cliques: tuple[tuple[str, ...], ...]


def rank_methods(values: pd.DataFrame, level: float = 0.05) -> Ranking:
    """Rank methods over data sets.

    Args:
        values: A row per data set, a column per method; higher is better.
        level: Level of the critical difference.

    Raises:
        DataError: A value is missing, or there are fewer than 2 methods.
    """
    blocks, methods = values.shape
    if methods < 2 or blocks < 1 or values.isna().to_numpy().any():
        raise DataError("ranks need at least 2 methods and a value of each on every data set.")
    ranks = rankdata(-values.to_numpy(float), axis=1)
    means = ranks.mean(axis=0)
    order = np.argsort(means, kind="stable")
    names = tuple(str(values.columns[i]) for i in order)
    critical = _NAN
    if blocks > 1:
        q = float(studentized_range.ppf(1 - level, methods, np.inf)) / math.sqrt(2)
        critical = q * math.sqrt(methods * (methods + 1) / (6 * blocks))
    sorted_means = means[order]
    return Ranking(
        names, tuple(float(m) for m in sorted_means), blocks, _friedman(ranks), critical,
        _cliques(names, sorted_means, critical),
    )  # fmt: skip


def _friedman(ranks: np.ndarray) -> float:
    blocks, methods = ranks.shape
    if methods < 3 or blocks < 2 or not np.ptp(ranks):
        return _NAN
    return float(friedmanchisquare(*ranks.T).pvalue)


def _cliques(names: tuple[str, ...], means: np.ndarray, critical: float) -> tuple[tuple[str, ...], ...]:
    if np.isnan(critical):
        return ()
    ends = [int(np.searchsorted(means, mean + critical, side="left")) for mean in means]
    runs = [(start, end) for start, end in enumerate(ends) if end - start > 1]
    longest = [run for i, run in enumerate(runs) if i == 0 or run[1] > runs[i - 1][1]]
    return tuple(names[start:end] for start, end in longest)
