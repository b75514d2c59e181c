"""What the folds of a run with a search chose, and the price of having looked, from the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfusion.files import read_json
from cfusion.run_folder import SEARCH, TRIALS, FinishedRun
from cfusion.survival.metrics import concordance
from cfusion.survival.predictions import read_predictions

_NAN = float("nan")


@dataclass(frozen=True)
class ReportedTrial:
    """One trial of a fold.

    Attributes:
        number: From 0.
        state: done, pruned or failed.
        words: Its values.
        score: Score on the inner validation patients; NaN unless done.
        outer: Harrell's C of the scored fold, which decided nothing; NaN unless done.
    """

    number: int
    state: str
    words: str
    score: float
    outer: float


@dataclass(frozen=True)
class FoldChoice:
    """The search of one fold.

    Attributes:
        name: The fold.
        seed: Seed of the run.
        trials: All trials, in order.
    """

    name: str
    seed: int
    trials: tuple[ReportedTrial, ...]

    @property
    def _chosen(self) -> ReportedTrial:
        done = [trial for trial in self.trials if trial.state == "done"]
        return max(done, key=lambda trial: trial.score)

    @property
    def chosen_words(self) -> str:
        """The values of the chosen trial."""
        return self._chosen.words

    @property
    def inner(self) -> float:
        """Score of the chosen trial on the inner validation patients."""
        return self._chosen.score

    @property
    def outer(self) -> float:
        """C of the chosen trial on the scored fold."""
        return self._chosen.outer

    @property
    def best_outer(self) -> float:
        """Highest C of any trial on the scored fold."""
        return max(trial.outer for trial in self.trials if trial.state == "done")

    @property
    def price(self) -> float:
        """What a choice by the scored fold would have seemed to gain."""
        return self.best_outer - self.outer

    @property
    def pruned(self) -> int:
        """Number of pruned trials."""
        return sum(trial.state == "pruned" for trial in self.trials)

    @property
    def failed(self) -> int:
        """Number of failed trials."""
        return sum(trial.state == "failed" for trial in self.trials)


def choices_of(runs: Sequence[FinishedRun]) -> tuple[FoldChoice, ...]:
    """Return what the folds of finished runs chose; empty without a search."""
    return tuple(choice for run in runs for choice in fold_choices(run.folder, run.config.seed))


def fold_choices(run: Path, seed: int) -> tuple[FoldChoice, ...]:
    """Return what the folds of one finished run chose; empty without a search."""
    folders = sorted(path.parent for path in (run / SEARCH).glob(f"*/{TRIALS}"))
    return tuple(
        FoldChoice(folder.name, seed, tuple(_trial(folder, row) for row in read_json(folder / TRIALS)))
        for folder in folders
    )


def _trial(folder: Path, row: dict[str, Any]) -> ReportedTrial:
    words = ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in row["values"].items())  # fmt: skip
    if row["state"] != "done":
        return ReportedTrial(row["number"], row["state"], words, _NAN, _NAN)
    scored = read_predictions(folder / f"trial_{row['number']}.csv")
    outer = concordance(scored["survival_months"], scored["event"], scored["risk"]).cindex
    return ReportedTrial(row["number"], row["state"], words, float(row["score"]), outer)
