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
