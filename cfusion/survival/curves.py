"""How a risk and a step curve are read; without scikit-survival, so that a prediction need not load it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def is_high_risk(risk: np.ndarray | float, cutoff: np.ndarray | float) -> np.ndarray:
    """[case], true where a patient belongs to the high-risk group: the risk is at least the cut-off.

    MCAT's published p-values split this way, so a patient at the median belongs to the high-risk group.

    Args:
        risk: [case], or of one case.
        cutoff: One for all cases, or [case].
    """
    return np.asarray(np.asarray(risk) >= cutoff)


def step_values(
    steps: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    times: np.ndarray | float,
    *,
    before: float,
) -> np.ndarray:
    """[time], values of a curve of steps at other times: each value holds from its own step until the next.

    Args:
        steps: [step], increasing times.
        values: [step], the value from each of them on.
        times: Where the curve is read, in the unit of `steps`.
        before: The value before the first step; 1 for survival.
    """
    return np.asarray(np.concatenate([[before], values])[np.searchsorted(steps, times, side="right")])


YEARS = (1, 3, 5)
"""Years after which survival is stated."""


def survival_after_years(
    edges_months: Sequence[float] | np.ndarray, survival: Sequence[float] | np.ndarray
) -> dict[int, float]:
    """Return predicted survival after each of `YEARS`; NaN beyond the last finite edge, where nothing is predicted.

    Args:
        edges_months: [bin], right edges of the time bins.
        survival: [bin], survival past each of them.
    """
    last = max((edge for edge in edges_months if np.isfinite(edge)), default=0.0)
    found = step_values(edges_months, survival, 12.0 * np.array(YEARS), before=1.0)
    return {year: float(at) if 12 * year <= last else float("nan") for year, at in zip(YEARS, found, strict=True)}


def risk_words(percentile: float, years: dict[int, float]) -> str:
    """Return a risk in words that need no scale: `above 82% of the training patients; survival 91% at 1 year, …`."""
    place = [] if np.isnan(percentile) else [f"above {percentile:.0f}% of the training patients"]
    known = [f"{at:.0%} at {year} year{'s' * (year > 1)}" for year, at in years.items() if not np.isnan(at)]
    return "; ".join([*place, *(["predicted survival " + ", ".join(known)] if known else [])])
