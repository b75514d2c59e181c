"""The table of a report: every score next to the score of a model without signal under the same protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cfusion.report.context import ReportContext
from cfusion.survival.null import SCORED_FOLD_CHOOSES, EpochChoice, Null, Outcomes, simulate_null
from cfusion.survival.predictions import STRATUM, UNIT
from cfusion.survival.score import Key, Scores


@dataclass(frozen=True)
class CohortNull:
    """Nulls of one cohort under one protocol.

    Attributes:
        independent: Null with new risks in every epoch.
        correlated: Null with slowly changing risks (AR(1), 0.9); the same if no epoch is chosen on the scored fold.
        unchanged: Null with the same risks in every epoch, so that the choice of the epoch gains nothing.
    """

    independent: Null
    correlated: Null
    unchanged: Null


def nulls(scores: Sequence[Scores], context: ReportContext) -> dict[Key, CohortNull]:
    """Simulate the null of the run behind every row of the summaries; identical ones are simulated once."""
    known: dict[tuple, CohortNull] = {}
    found = {}
    for part in scores:
        for (cohort, model, protocol), rows in part.groups():
            folds, digest = first_run_outcomes(rows)
            choice = context.choice((cohort, model, protocol)) if protocol in SCORED_FOLD_CHOOSES else None
            if (digest, choice) not in known:
                known[digest, choice] = cohort_null(folds, choice)
            found[cohort, model, protocol] = known[digest, choice]
    return found


def first_run_outcomes(rows: pd.DataFrame) -> tuple[list[Outcomes], tuple]:
    """Return the outcomes of each fold of the first seed and repeat, and a key that identifies equal runs."""
    chosen = rows[(rows["seed"] == rows["seed"].min()) & (rows["repeat"] == rows["repeat"].min())]
    fold, time, event = (chosen[name].to_numpy() for name in ("fold", "survival_months", "event"))
    stratum = [chosen.groupby(STRATUM).ngroup().to_numpy()] if STRATUM in chosen else []
    order = np.lexsort((*stratum, event, time, fold))
    columns = [values[order] for values in (time, event, *stratum)]
    cuts = np.flatnonzero(np.diff(fold[order])) + 1
    folds = list(zip(*(np.split(values, cuts) for values in columns), strict=True))
    return folds, (cuts.tobytes(), *(values.tobytes() for values in columns))


def cohort_null(folds: list[Outcomes], choice: EpochChoice | None) -> CohortNull:
    """Simulate the nulls; `choice` None: no epoch is chosen on the scored fold."""
    plain = simulate_null(folds, chosen_on_scored_fold=False)
    if choice is None:
        return CohortNull(plain, plain, plain)
    independent, correlated = (
        simulate_null(folds, chosen_on_scored_fold=True, autocorrelation=memory, choice=choice) for memory in (0.0, 0.9)
    )
    return CohortNull(independent, correlated, plain)


def evidence_table(scores: Sequence[Scores], context: ReportContext) -> pd.DataFrame:
    """Add nulls, permuted and oracle C, and the optimism gap to the summaries.

    Rows are grouped by cohort. Added columns: `endpoint` (empty if unknown), `null_mean, null_low, null_high` (95%
    range of noise scores over cross-validations; if the epoch is chosen on the scored fold, from the lower limit of
    risks that never change to the upper one of risks that are new in every epoch), `null_high_error` (Monte-Carlo
    error of the upper limit), `null_correlated_mean`, `permuted`, `oracle`, and `optimism_gap`: the C under `published`
    minus that under `strict`, for models that have both.
    """
    table = pd.concat([part.summary for part in scores], ignore_index=True)
    first_seen = {name: order for order, name in enumerate(dict.fromkeys(table["cohort"]))}
    table = table.sort_values("cohort", key=lambda names: names.map(first_seen), kind="stable", ignore_index=True)
    simulated = nulls(scores, context)
    keys = [(str(c), str(m), str(p)) for c, m, p in table[UNIT].itertuples(index=False)]
    table["endpoint"] = [context.endpoints.get(key[0], "") for key in keys]
    table["null_mean"] = [simulated[key].independent.mean for key in keys]
    table["null_low"] = [simulated[key].unchanged.low for key in keys]
    table["null_high"] = [simulated[key].independent.high for key in keys]
    table["null_high_error"] = [simulated[key].independent.high_error for key in keys]
    table["null_correlated_mean"] = [simulated[key].correlated.mean for key in keys]
    table["permuted"] = [context.permuted.get(key, np.nan) for key in keys]
    table["oracle"] = [context.oracle.get(key, np.nan) for key in keys]
    means = {key: float(value) for key, value in zip(keys, table["cindex_mean"], strict=True)}
    table["optimism_gap"] = [
        means.get((c, m, "published"), np.nan) - means.get((c, m, "strict"), np.nan) for c, m, _ in keys
    ]
    return table
