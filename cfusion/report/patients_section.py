"""The report's section on the scored patients: follow-up, folds, subgroups, mean survival, proportional hazards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cfusion.cohort.identifiers import site_of
from cfusion.survival.bootstrap import Resamples
from cfusion.survival.curves import is_high_risk
from cfusion.survival.description import Description, describe
from cfusion.survival.predictions import UNIT
from cfusion.survival.score import Key, Scores

_MOST = 12
"""Models that are described; a comparison of more is about the models, and `cfusion report RUN` describes each."""

_REPLICATES = 300
_SEED = 7


@dataclass(frozen=True)
class DescribedResult:
    """One result of the section.

    Attributes:
        key: Cohort, model and protocol.
        description: Its description.
        folds: Rows of the table of folds: a name and a cell per fold.
    """

    key: Key
    description: Description
    folds: list[tuple[str, list[str]]]


def described(scores: Sequence[Scores]) -> list[DescribedResult]:
    """Describe the patients of each result; none with more than a dozen."""
    groups = [(part, key) for part in scores for key in part.patients if key[0] != part.joint]
    if len(groups) > _MOST:
        return []
    return [_described(part, key) for part, key in groups]


def _described(part: Scores, key: Key) -> DescribedResult:
    rows = part.predictions[(part.predictions[UNIT].astype(str) == list(key)).all(axis=1)]
    first = rows[(rows["seed"] == rows["seed"].min()) & (rows["repeat"] == rows["repeat"].min())]
    first = first.sort_values("case_id", ignore_index=True)
    sites = first["case_id"].map(site_of)
    if sites.notna().all():
        first = first.assign(site=sites)
    resampled = bool(part.summary["within_low"].notna().any())
    draws = None
    if resampled:
        draws = Resamples.draw(first["survival_months"], first["event"], replicates=_REPLICATES, seed=_SEED)
    found = describe(first, _high_risk(first), part.covariates, draws)
    return DescribedResult(key, found, _fold_rows(found.by_fold, found.shares))


def _high_risk(first: pd.DataFrame) -> np.ndarray:
    """Return the risk groups as the Kaplan–Meier curves have them."""
    risk = first["risk"].to_numpy(float)
    if "risk_cutoff" in first.columns and first["risk_cutoff"].notna().all():
        return is_high_risk(risk, first["risk_cutoff"].to_numpy(float))
    return is_high_risk(risk, np.median(risk))


def _fold_rows(table: pd.DataFrame, shares: frozenset[str]) -> list[tuple[str, list[str]]]:
    """Return the table of folds, a row per quantity."""
    rows = []
    for name in table.columns[1:]:
        counts, share = name in ("patients", "events"), name in shares
        cells = [_cell(value, counts, share) for value in table[name]]
        words = name if counts else f"{str(name).replace('=', ': ')} ({'share' if share else 'median'})"
        rows.append((words, cells))
    return rows


def _cell(value: Any, counts: bool, share: bool) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.0f}" if counts else f"{value:.0%}" if share else f"{value:g}"
