"""Signs that predictions are in another unit, on another scale or of the other sign, for a person to check."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from cfusion.survival.predictions import FOLD, UNIT, survival_columns

_UNIT_FACTOR = 2.5
"""The last edge may be this many times the longest follow-up, or the other way round."""

_CONTRADICTION = 0.3
"""Rank correlation of risk and predicted survival above which they contradict each other."""

_MEAN_TOLERANCE = 1.25
"""Factor by which expected events may differ from observed ones."""


class Doubt(str):
    """A remark that outcomes or predictions are probably wrong: a report shows it before its first table."""

    __slots__ = ()


def prediction_doubts(frame: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    """Return remarks on the predictions of each model and cohort.

    Args:
        frame: Checked predictions.
        summary: A row per cohort, model and protocol; intervals may be NaN.
    """
    rows_of = dict(iter(frame.groupby(UNIT, sort=False)))
    found: list[str] = []
    for row in summary.to_dict("records"):
        rows = rows_of.get(tuple(row[name] for name in UNIT))
        if rows is None:  # cohorts that were trained as one have their doubts each in their own row
            continue
        units = list(_units(rows))
        of = f"{row['cohort']}, {row['model']}"
        found += [Doubt(f"{of}: {doubt}.") for doubt in _sign(row)]
        found += [Doubt(f"{of}: {doubt}.") for doubt in units] or [f"{of}: {words}." for words in _mean(row)]
        found += [Doubt(f"{of}: {doubt}.") for doubt in (*_scale(rows), *_contradiction(rows))]
    return found


def _sign(row: dict) -> Iterator[str]:
    columns = (("cindex_within", "within_low", "within_high"), ("cindex_pooled", "cindex_low", "cindex_high"))
    for name, low, high in columns:
        if row[high] < 0.5:
            yield (
                f"C {row[name]:.3f} [{row[low]:.3f}, {row[high]:.3f}] and its interval lie below .5; is the sign "
                "of the risk turned? A higher risk must be worse, so a predicted survival time needs a minus"
            )
            return


def _mean(row: dict) -> Iterator[str]:
    ratio, low, high = (math.exp(row[f"calibration_intercept{end}"]) for end in ("", "_low", "_high"))
    if high < 1 / _MEAN_TOLERANCE or low > _MEAN_TOLERANCE:
        yield (
            f"the model expects too {'many' if ratio < 1 else 'few'} events: during the follow-up observed/expected is "
            f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
        )


def _units(rows: pd.DataFrame) -> Iterator[str]:
    columns = survival_columns(rows)
    if columns is None:
        return
    last, longest = float(columns[1][:, -1].max()), float(rows["survival_months"].max())
    if last > _UNIT_FACTOR * longest or longest > _UNIT_FACTOR * last:
        unit = "days" if last > longest else "years"
        yield (
            f"the last edge_K is {last:g} and the longest survival_months {longest:g}; are the edges in {unit}? They "
            "must be in months"
        )


def _scale(rows: pd.DataFrame) -> Iterator[str]:
    if "risk_cutoff" not in rows.columns or rows["risk_cutoff"].isna().any():
        return
    outside = (rows["risk_cutoff"] > rows["risk"].max()) | (rows["risk_cutoff"] < rows["risk"].min())
    if outside.all():
        yield "every risk_cutoff lies outside the risks; is it on another scale?"


def _contradiction(rows: pd.DataFrame) -> Iterator[str]:
    columns = survival_columns(rows)
    if columns is None:
        return
    values = rows[FOLD].assign(risk=rows["risk"], survival=columns[0].sum(axis=1))
    ranks = values.groupby(FOLD, sort=False).rank(pct=True)
    if ranks.std().min() > 0 and np.corrcoef(ranks["risk"], ranks["survival"])[0, 1] > _CONTRADICTION:
        yield "patients with a higher risk have a higher predicted survival; one of the two has the wrong sign"
