"""The sentences that a report opens with: how well each model ranks, what it adds, how far its predictions are off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfusion.report.number_words import p_text
from cfusion.survival.calibration import survival_at
from cfusion.survival.curves import step_values
from cfusion.survival.groups import kaplan_meier
from cfusion.survival.notes import no_models
from cfusion.survival.null import SCORED_FOLD_CHOOSES
from cfusion.survival.predictions import UNIT, survival_columns
from cfusion.survival.score import Key, Scores

_MOST = 8
"""Number of models up to which each has a sentence; with more, the best of each cohort and protocol has one."""

_PROTOCOLS = {
    **{name: f"{name} protocol" for name in ("strict", "fixed-epoch")},
    "published": "published protocol, whose epoch was chosen on the scored fold",
    "unknown": "unknown protocol",
}
_LEVEL = 0.05
_HORIZON_MONTHS = 36.0
_MONTHS_PER_YEAR = 12.0


def opening_lines(rows: Sequence[Mapping[str, Any]], scores: Sequence[Scores]) -> list[str]:
    """Return a sentence per model: its C with interval and null, what it adds to the covariates, and its calibration.

    Args:
        rows: Rows of the evidence table, with `null_high`.
        scores: The scores behind them.
    """
    constant = {key for part in scores for key in no_models(part.predictions)}
    errors = {key: error for part in scores for key, error in _survival_errors(part).items()}
    shown = list(rows) if len(rows) <= _MOST else _best(rows)
    lines = []
    for row in shown:
        key = (str(row["cohort"]), str(row["model"]), str(row["protocol"]))
        if key in constant:
            lines.append(f"{key[1]} is no model of {key[0]}: within each fold all patients have the same risk.")
            continue
        parts = [_ranking(row), _addition(row), errors.get(key, "")]
        lines.append("; ".join(part for part in parts if part) + ".")
    return lines


def _best(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cohort"], row["protocol"]), []).append(row)
    return [max(group, key=lambda row: row["cindex_within"]) for group in groups.values()]


def short(value: float, digits: int = 2) -> str:
    """Format a score without its leading zero: .74; an unknown one as a dash."""
    if math.isnan(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    text = text[1:] if text.startswith("0.") else text
    return f"−{text}" if value < 0 and float(f"{value:.{digits}f}") else text


def _ranking(row: Mapping[str, Any]) -> str:
    value, low, high, noise = (float(row[name]) for name in ("cindex_within", "within_low", "within_high", "null_high"))
    beyond_noise = not (low if row["protocol"] in SCORED_FOLD_CHOOSES else value) <= noise
    if low > 0.5 and beyond_noise:
        how = "ranks patients better than chance"
    elif high < 0.5:
        how = "ranks patients worse than chance; check the sign of the risk"
    else:
        how = "is not shown to rank patients better than chance"
    interval = "" if math.isnan(low) else f", 95% {short(low)}–{short(high)}"
    null = "" if math.isnan(noise) else f"; noise reaches {short(noise)}"
    return f"{row['cohort']}: {row['model']} {how} ({_PROTOCOLS[row['protocol']]}: C {short(value)}{interval}{null})"


def _addition(row: Mapping[str, Any]) -> str:
    names = row.get("clinical_covariates")
    if not isinstance(names, str) or math.isnan(row["added_c"]):
        return ""
    known = f"{covariate_words(names)}, which reach {short(float(row['clinical_c']))} by themselves"
    value, low, high = (float(row[name]) for name in ("added_c", "added_c_low", "added_c_high"))
    digits = 2 if abs(value) >= 0.01 else 3
    gain = short(value, digits) + ("" if math.isnan(low) else f" ({short(low, digits)} to {short(high, digits)})")
    if low > 0:
        return f"it adds {gain} to {known}"
    if row["added_lr_p"] < _LEVEL and row["hr_sd_adjusted"] > 1:
        ratio = (
            f"adjusted hazard ratio {row['hr_sd_adjusted']:.2f} per SD, likelihood ratio {p_text(row['added_lr_p'])}"
        )
        return f"it adds to {known} ({ratio}), but its gain in C is uncertain: {gain}"
    return f"it is not shown to add to {known} (difference {gain})"


def covariate_words(names: str) -> str:
    """Return the columns of a clinical model in words: `age, sex=male, stage` → `age, sex and stage`."""
    words = list(dict.fromkeys(name.split("=")[0].replace("is_female", "sex") for name in names.split(", ")))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _survival_errors(scores: Scores) -> dict[Key, str]:
    """Say by how much the mean predicted survival differs from Kaplan–Meier at 3 years, or a nearer horizon."""
    found: dict[Key, str] = {}
    for names, rows in scores.predictions.groupby(UNIT, sort=False):
        first = rows[(rows["seed"] == rows["seed"].min()) & (rows["repeat"] == rows["repeat"].min())]
        columns = survival_columns(first)
        time, event = first["survival_months"].to_numpy(), first["event"].to_numpy()
        possible = [h for h in scores.horizons if (time >= h).mean() >= 0.1]
        if columns is None or not possible:
            continue
        horizon = min(possible, key=lambda h: abs(h - _HORIZON_MONTHS))
        predicted = float(survival_at(*columns, np.full(len(first), horizon)).mean())
        curve = kaplan_meier(time, event)
        observed = float(step_values(curve.months, curve.survival, horizon, before=1.0))
        points = round(100 * (predicted - observed))
        years = horizon / _MONTHS_PER_YEAR
        when = f"{years:g}-year" if years == int(years) else f"{horizon:g}-month"
        cohort, model, protocol = (str(name) for name in names)
        found[cohort, model, protocol] = (
            f"predicted {when} survival is right on average" if points == 0 else
            f"predicted {when} survival is {abs(points)} point{'s' if abs(points) > 1 else ''} too "
            f"{'high' if points > 0 else 'low'}"
        )  # fmt: skip
    return found
