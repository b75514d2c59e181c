"""Discrimination and error of survival predictions: Harrell, Uno, Brier, time-dependent AUC.

scikit-survival computes; this module is its door. It checks the input once, fixes what is estimated from training
patients (censoring model, truncation), and gives a score that does not exist as an error, never as 0 or 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sksurv.exceptions import NoComparablePairException
from sksurv.metrics import concordance_index_censored

from cfusion.errors import DataError, UndefinedMetricError
from cfusion.survival.bootstrap import bootstrap_cindex

__all__ = ["Concordance", "bootstrap_cindex", "checked", "concordance"]

TIED_RISK = 1e-8
"""Risks this close are tied and count half."""


@dataclass(frozen=True)
class Concordance:
    """Harrell's C and the pairs it counts.

    Attributes:
        cindex: (concordant + tied_risk / 2) / comparable pairs, 0 … 1; 0.5 without any signal.
        concordant: Pairs where the patient with the earlier event has the higher risk.
        discordant: Pairs where that patient has the lower risk.
        tied_risk: Comparable pairs of equal risk (within 1e-8).
        tied_time: Comparable pairs of an event and a censoring at the same time.
    """

    cindex: float
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int


def checked(time: ArrayLike, event: ArrayLike, *values: ArrayLike) -> tuple[np.ndarray, ...]:
    """Outcomes and values as arrays of one length.

    Raises:
        DataError: Lengths differ, a time is negative, or anything is NaN or infinite.
    """
    arrays = [np.asarray(time, dtype=float), np.asarray(event), *(np.asarray(v, dtype=float) for v in values)]
    if len({len(array) for array in arrays}) != 1:
        raise DataError(f"times, events and risks differ in length: {', '.join(str(len(a)) for a in arrays)}.")
    if arrays[1].dtype != bool:
        if not np.isin(arrays[1], [0, 1]).all():
            raise DataError("events hold values other than 0 and 1.")
        arrays[1] = arrays[1].astype(bool)
    for name, array in zip(("time", "event", *["risk"] * len(values)), arrays, strict=True):
        if not np.isfinite(array).all():
            raise DataError(f"{int((~np.isfinite(array)).sum())} of {array.size} values of {name} are not finite.")
    if (arrays[0] < 0).any():
        raise DataError(f"a time is negative ({arrays[0].min():g} months).")
    return tuple(arrays)


def concordance(time: ArrayLike, event: ArrayLike, risk: ArrayLike) -> Concordance:
    """Harrell's concordance index (Harrell et al., Statistics in Medicine 15, 1996); ties in risk count half.

    Args:
        time: [case], months, ≥ 0.
        event: [case], true where the event happened.
        risk: [case], higher is worse.

    Raises:
        DataError: The arrays differ in length or hold values that are not finite.
        UndefinedMetricError: There is no comparable pair.
    """
    time, event, risk = checked(time, event, risk)
    if not event.any() or len(time) < 2:
        raise UndefinedMetricError(f"no comparable pair among {len(time)} patients with {int(event.sum())} events.")
    try:
        return Concordance(*concordance_index_censored(event, time, risk, tied_tol=TIED_RISK))
    except NoComparablePairException as error:
        raise UndefinedMetricError(f"no comparable pair among {len(time)} patients.") from error
