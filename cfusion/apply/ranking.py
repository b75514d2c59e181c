"""Test whether a run ranks held-out patients better than chance, which decides whether its explanations mean anything.

The statistic is the mean over folds of Harrell's C of the out-of-fold predictions. Chance is `simulate_null` on the
same outcomes, folds and choice of the epoch, as in reports. The p-value is one-sided and normal.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cfusion.errors import CfusionError, UndefinedMetricError
from cfusion.run_folder import CONFIG, PREDICTIONS, is_run, predictions_file, read_config
from cfusion.survival.metrics import concordance
from cfusion.survival.null import SCORED_FOLD_CHOOSES, EpochChoice, Outcomes, simulate_null
from cfusion.survival.predictions import STRATUM, read_predictions

logger = logging.getLogger(__name__)

LEVEL = 0.05
"""Share of the runs without signal that seem to rank patients."""


@dataclass(frozen=True)
class RunRanking:
    """How a run ranks the patients that its models have not seen.

    Attributes:
        cindex: Mean over folds of Harrell's C.
        chance: Mean of the same score without signal; above 0.5 where the epoch was chosen on the scored fold.
        p: One-sided p-value that the run ranks patients no better than chance.
        patients: Number of held-out patients.
        events: Number of their events.
    """

    cindex: float
    chance: float
    p: float
    patients: int
    events: int

    @property
    def above_chance(self) -> bool:
        """Whether the run ranks held-out patients better than chance."""
        return self.p <= LEVEL

    def __str__(self) -> str:
        """Return it in words: `C .702 of 72 held-out patients; chance .500, p .003`."""
        cindex, chance, p = (f"{value:.3f}".removeprefix("0") for value in (self.cindex, self.chance, self.p))
        return f"C {cindex} of {self.patients} held-out patients; chance {chance}, p {'< .001' if p == '.000' else p}"

    def record(self) -> dict[str, float]:
        """Return it as an explanation records it; `RunRanking(**record)` gives it back."""
        return asdict(self)


def rank_test(predictions: pd.DataFrame, choice: EpochChoice | None = None) -> RunRanking | None:
    """Test the out-of-fold predictions of one run; None if no fold has a comparable pair.

    Args:
        predictions: Checked predictions of one model, cohort and protocol; of several repeats, all count.
        choice: Epochs from which the run chose, for protocols that choose on the scored fold; None: the
            published recipe.
    """
    on_scored = predictions["protocol"].iloc[0] in SCORED_FOLD_CHOOSES
    scores: list[float] = []
    outcomes: list[Outcomes] = []
    for (_, repeat, _), rows in predictions.groupby(["seed", "repeat", "fold"]):
        stratum = [rows.groupby(STRATUM).ngroup().to_numpy()] if STRATUM in rows else []
        time, event = rows["survival_months"].to_numpy(), rows["event"].to_numpy()
        try:
            scores.append(concordance(time, event, rows["risk"], *stratum).cindex)
        except UndefinedMetricError:
            continue
        if repeat == predictions["repeat"].min():
            outcomes.append((time, event, *stratum))
    if not outcomes:
        return None
    null = simulate_null(outcomes, chosen_on_scored_fold=on_scored, choice=choice or EpochChoice())
    cindex = float(np.mean(scores))
    patients = predictions.drop_duplicates("case_id")
    return RunRanking(cindex, null.mean, null.p_above(cindex), len(patients), int(patients["event"].sum()))


def run_ranking(folder: Path) -> RunRanking | None:
    """Test the run in a folder, or of a fold's folder in it; None if there are no usable predictions of a run."""
    run = folder if is_run(folder) or not is_run(folder.parent) else folder.parent
    if not (run / PREDICTIONS).is_file():
        return None
    try:
        choice = EpochChoice.of(read_config(run).train) if (run / CONFIG).is_file() else None
        return rank_test(read_predictions(predictions_file(run)), choice)
    except CfusionError as error:
        logger.warning("%s: it is not known whether the run ranks patients better than chance: %s", run, error.message)
        return None


__all__ = ["LEVEL", "RunRanking", "rank_test", "run_ranking"]
