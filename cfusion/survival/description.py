"""What a reader must know of the scored patients: follow-up, censoring, covariates, subgroups, mean survival."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cfusion.cohort.findings import has_comparable_pair
from cfusion.errors import UndefinedMetricError
from cfusion.survival.added import standardised
from cfusion.survival.bootstrap import Resamples, cross_validated_interval
from cfusion.survival.groups import kaplan_meier
from cfusion.survival.regression import proportional_hazards_p
from cfusion.survival.site_reading import SiteReading, read_sites

_NAN = float("nan")
_SMALLEST_GROUP = 10
"""Minimum number of events of a subgroup whose C is shown."""
_MOST_SITES = 8
_AT_RISK = 0.1
_NORMAL = 1.959964


@dataclass(frozen=True)
class Subgroup:
    """C within folds among some of the patients, on the same resampled patients as that of all.

    Attributes:
        name: Such as `sex=male`.
        size: Patients.
        events: Events among them.
        cindex: C within folds.
        low: Lower limit of its 95% interval; NaN without a bootstrap.
        high: Upper limit.
    """

    name: str
    size: int
    events: int
    cindex: float
    low: float
    high: float


@dataclass(frozen=True)
class MeanSurvival:
    """Restricted mean survival time of two risk groups (Royston and Parmar, 2013), up to a common horizon.

    Attributes:
        months: The horizon: the last time at which a tenth of each group is at risk.
        low_risk: Mean months survived up to it by the low-risk group.
        high_risk: The same of the high-risk group.
        difference: Low less high.
        low: Lower limit of the difference's 95% interval.
        high: Upper limit.
    """

    months: float
    low_risk: float
    high_risk: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Description:
    """The scored patients of a cohort, model and protocol.

    Attributes:
        follow_up: Median follow-up in months by the reverse Kaplan–Meier estimate (Schemper and Smith, 1996); NaN where
            fewer than half are censored.
        censored: Share of patients without the event.
        by_fold: A row per fold: patients, events, and medians of the covariates (means of those of 0 and 1).
        shares: Covariates of 0 and 1.
        subgroups: C by sex, age, other covariates and site.
        mean_survival: Restricted mean survival time of the risk groups; None if a group is empty.
        site: How well the site can be read from the risk, standardised within folds; None without two large sites.
        proportional_p: P-value of the test that the hazard ratio of the risk is constant over time; NaN if undefined.
    """

    follow_up: float
    censored: float
    by_fold: pd.DataFrame
    shares: frozenset[str]
    subgroups: tuple[Subgroup, ...]
    mean_survival: MeanSurvival | None
    site: SiteReading | None
    proportional_p: float


def describe(
    first: pd.DataFrame, high_risk: np.ndarray, covariates: pd.DataFrame | None, draws: Resamples | None
) -> Description:
    """Describe the patients of one run.

    Args:
        first: Checked predictions of one cohort, model, protocol, seed and repeat, with `site` where it is known.
        high_risk: [case], true in the high-risk group.
        covariates: [case, column], indexed by `case_id`; None: unknown.
        draws: Draws of these patients, in their order; None: no intervals.
    """
    time, event, risk, fold = (first[c].to_numpy() for c in ("survival_months", "event", "risk", "fold"))
    known = pd.DataFrame(index=first["case_id"]) if covariates is None else covariates
    values = known.reindex(first["case_id"]).reset_index(drop=True).dropna(axis=1, how="all")
    columns = {"fold": fold, "patients": 1, "events": event.astype(int)}
    table = pd.DataFrame(columns)
    rule: dict[str, str] = {"patients": "sum", "events": "sum"}
    for name in values.columns:
        table[str(name)] = values[name]
        rule[str(name)] = "mean" if values[name].dropna().isin([0, 1]).all() else "median"
    try:
        proportional = proportional_hazards_p(risk, time, event, fold)
    except UndefinedMetricError:
        proportional = _NAN
    return Description(
        follow_up=_median(time, ~event),
        censored=float(1 - event.mean()),
        by_fold=table.groupby("fold").agg(rule).reset_index(),
        shares=frozenset(name for name, how in rule.items() if how == "mean"),
        subgroups=_subgroups(first, values, draws),
        mean_survival=_mean_survival(time, event, high_risk),
        site=_site(first),
        proportional_p=proportional,
    )


def _median(time: np.ndarray, event: np.ndarray) -> float:
    """Return the median of a Kaplan–Meier curve; NaN if it never falls to one half."""
    curve = kaplan_meier(time, event)
    below = np.flatnonzero(np.array(curve.survival) <= 0.5)
    return curve.months[below[0]] if len(below) else _NAN


def _subgroups(first: pd.DataFrame, values: pd.DataFrame, draws: Resamples | None) -> tuple[Subgroup, ...]:
    members: dict[str, np.ndarray] = {}
    for name in values.columns:
        members |= _split(str(name), values[name].to_numpy(float))
    if "site" in first.columns:
        site = first["site"].astype("string")
        common = site.value_counts().head(_MOST_SITES).index
        members |= {f"site {name}": (site == name).fillna(False).to_numpy(bool) for name in common}
    found = (_subgroup(name, first, rows, draws) for name, rows in members.items())
    return tuple(group for group in found if group is not None)


def _site(first: pd.DataFrame) -> SiteReading | None:
    if "site" not in first.columns:
        return None
    z = standardised(first["risk"].to_numpy(float), first["fold"].to_numpy())
    return read_sites(z[:, None], first["site"].astype("string").fillna("").to_numpy(str))


def _split(name: str, values: np.ndarray) -> Mapping[str, np.ndarray]:
    """Return the two groups of a covariate: its levels if it is 0 or 1, else up to and above its median."""
    known = values[np.isfinite(values)]
    if not len(known) or np.ptp(known) == 0:
        return {}
    if np.isin(known, [0, 1]).all():
        column, _, level = name.partition("=")
        return {f"{column}: {level or 'yes'}": values == 1, f"{column}: not {level or 'yes'}": values == 0}
    median = float(np.median(known))
    return {f"{name} ≤ {median:g}": values <= median, f"{name} > {median:g}": values > median}


def _subgroup(name: str, first: pd.DataFrame, rows: np.ndarray, draws: Resamples | None) -> Subgroup | None:
    mine = first[rows]
    time, event, risk, fold = (mine[c].to_numpy() for c in ("survival_months", "event", "risk", "fold"))
    pairs = any(has_comparable_pair(time[fold == f], event[fold == f]) for f in np.unique(fold))
    if event.sum() < _SMALLEST_GROUP or not pairs:
        return None
    once = Resamples(time, event, np.ones((1, len(mine)), dtype=np.float32))
    value = float(once.cindex(risk, within=fold)[0])
    spread = None if draws is None else draws.of(np.flatnonzero(rows)).cindex(risk, within=fold)
    limits = cross_validated_interval(value, spread, folds=len(np.unique(fold)))
    return Subgroup(name, len(mine), int(event.sum()), value, *limits)


def _mean_survival(time: np.ndarray, event: np.ndarray, high_risk: np.ndarray) -> MeanSurvival | None:
    if not high_risk.any() or high_risk.all():
        return None
    months = float(min(np.quantile(time[rows], 1 - _AT_RISK) for rows in (high_risk, ~high_risk)))
    (low, low_variance), (high, high_variance) = (
        restricted_mean(time[rows], event[rows], months) for rows in (~high_risk, high_risk)
    )
    margin = _NORMAL * float(np.sqrt(low_variance + high_variance))
    return MeanSurvival(months, low, high, low - high, low - high - margin, low - high + margin)


def restricted_mean(time: np.ndarray, event: np.ndarray, months: float) -> tuple[float, float]:
    """Return the area under the Kaplan–Meier curve up to a horizon, and its variance (Klein and Moeschberger, 4.5).

    Args:
        time: [case], months.
        event: [case], true where the event happened.
        months: The horizon.
    """
    moments = np.unique(time[event & (time <= months)])
    followed = np.array([(time >= moment).sum() for moment in moments], dtype=float)
    events = np.array([(event & (time == moment)).sum() for moment in moments], dtype=float)
    survival = np.concatenate([[1.0], np.cumprod(1 - events / followed)])
    areas = survival * np.diff(np.concatenate([[0.0], moments, [months]]))
    left = np.cumsum(areas[::-1])[::-1][1:]  # area from each event time on
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = left**2 * events / (followed * (followed - events))
    return float(areas.sum()), float(np.nan_to_num(parts, nan=0.0, posinf=0.0).sum())
