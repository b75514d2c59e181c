"""Nested search: each fold chooses settings by trials on its training side, and is scored once with the chosen ones.

A trial trains on the fold's training patients; its score is that of its best epoch on the inner validation patients,
which also choose the epoch. The scored patients decide nothing: their predictions by every trial are kept for the
report, which says what a choice by them would have gained.

What a trial draws depends on the seed, the fold and the trials before it. After an interruption the finished trials are
replayed from their file and the search goes on as if there had been none.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cfusion.config import Config, SearchConfig, as_integer
from cfusion.errors import CfusionError, DataError, MissingExtraError, RequeueError
from cfusion.files import atomic_path, digest_json, read_json, write_json
from cfusion.interruption import stop_requested
from cfusion.run_folder import SEARCH, TRIALS, fold_name
from cfusion.runs.run import Run
from cfusion.training.folds import FoldRun, fit
from cfusion.training.runtime import Runtime
from cfusion.types import Split

logger = logging.getLogger(__name__)

_WARM_UP_TRIALS = 5
"""Trials before the first is pruned."""


@dataclass(frozen=True)
class Trial:
    """One trial of a fold's search.

    Attributes:
        number: From 0.
        values: `section.key` → value.
        state: `pruned`: ended early; `failed`: its training failed.
        epochs: Validation score of each epoch, higher is better.
        score: That of the chosen epoch; None unless done.
        cause: Why it failed.
    """

    number: int
    values: Mapping[str, Any]
    state: Literal["done", "pruned", "failed"]
    epochs: tuple[float, ...] = ()
    score: float | None = None
    cause: str = ""


@dataclass
class FoldSearch:
    """The search of one fold.

    Attributes:
        runtime: The processes; all make the same trials.
        run: The run.
        split: The fold.
        stop: Whether to save the state and stop, asked after every step.
        trials: What is done of it.
    """

    runtime: Runtime
    run: Run
    split: Split
    stop: Callable[[], bool]
    trials: list[Trial] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where its trials are kept."""
        name = fold_name(self.split.fold, self.split.repeat, self.run.config.splits.repeats)
        return self.run.folder / SEARCH / name

    @property
    def best(self) -> Trial | None:
        """The finished trial with the highest validation score, the earlier of two alike; None if none is finished."""
        done = [trial for trial in self.trials if trial.score is not None]
        return max(done, key=lambda trial: trial.score or 0.0, default=None)

    def __call__(self) -> None:
        """Do the trials that are left, and make the best one's model the fold's. Every rank must call this.

        Raises:
            DataError: Every trial failed.
            RequeueError: The process was asked to stop; the state is saved.
        """
        settings = self.run.config.search
        assert settings is not None
        stored = read_json(self.folder / TRIALS) if (self.folder / TRIALS).is_file() else []
        self.trials = [Trial(**{**row, "epochs": tuple(row["epochs"])}) for row in self.runtime.from_main(stored)]
        while len(self.trials) < settings.trials:
            self._attempt(settings)
        if self.best is None:
            raise DataError(
                f"fold {self.split.fold}: all {len(self.trials)} trials of the search failed or were pruned; the last: "
                f"{self.trials[-1].cause}",
                "Narrow search.space.",
            )
        if self.runtime.is_main:
            (self.folder / "best").rename(self.run.fold_folder(self.split))  # it appears complete
        self.runtime.barrier()

    def _attempt(self, settings: SearchConfig) -> None:
        number = len(self.trials)
        study = _Study(settings, f"{self.run.config.seed} {self.split.repeat} {self.split.fold}", self.trials)
        values = self.runtime.from_main(study.draw() if self.runtime.is_main else {})
        config = self.run.config.with_chosen(values)
        running = self.folder / f"trial_{number}.json"
        epochs: list[float] = read_json(running) if self.runtime.is_main and running.is_file() else []

        def record(epoch: int, metrics: dict[str, float]) -> None:
            score = metrics["validation_cindex"] if config.train.monitor == "cindex" else -metrics["validation_loss"]
            del epochs[epoch:]
            epochs.append(score)
            write_json(running, epochs)

        def pruned() -> bool:
            return settings.prune and bool(epochs) and study.is_hopeless(epochs)

        checkpoints = self.run.fold_checkpoints(self.split) / f"trial_{number}"
        trial = Trial(number, values, "pruned")
        try:
            result = fit(
                config, self.run.cohort, self.split, runtime=self.runtime, folder=checkpoints, code=self.run.code,
                starts=self.run.starts, stop=lambda: self.stop() or pruned(), on_epoch=record,
            )  # fmt: skip
            trial = self._finished(trial, config, result)
        except RequeueError:
            interrupted = self.runtime.sum([float(self.stop() or stop_requested())])[0] > 0
            if not self.runtime.from_main(pruned()) or interrupted:
                raise
        except CfusionError as error:
            logger.warning("%s: trial %d failed: %s The search continues.", self.folder, number, error.message)
            trial = dataclasses.replace(trial, state="failed", cause=error.message)
        self._record(dataclasses.replace(trial, epochs=tuple(self.runtime.from_main(epochs))))
        if self.runtime.is_main:
            shutil.rmtree(checkpoints, ignore_errors=True)
            running.unlink(missing_ok=True)
        self.runtime.barrier()

    def _finished(self, trial: Trial, config: Config, result: FoldRun) -> Trial:
        """Keep the predictions of a trial, and its model if it is the best so far."""
        column = "validation_cindex" if config.train.monitor == "cindex" else "validation_loss"
        score = float(result.history.loc[result.history["epoch"] == result.best_epoch, column].iloc[0])
        done = dataclasses.replace(trial, state="done", score=score if config.train.monitor == "cindex" else -score)
        best = self.best
        if best is None or (done.score or 0.0) > (best.score or 0.0):
            self.run.write_fold(self.runtime, result, folder=self.folder / "best", chosen=dict(trial.values))
        if self.runtime.is_main:
            with atomic_path(self.folder / f"trial_{trial.number}.csv") as temporary:
                result.predictions.to_csv(temporary, index=False)
        return done

    def _record(self, trial: Trial) -> None:
        self.trials.append(trial)
        if self.runtime.is_main:
            write_json(self.folder / TRIALS, [dataclasses.asdict(one) for one in self.trials])


class _Study:
    """Optuna's study of a fold's trials so far."""

    def __init__(self, settings: SearchConfig, name: str, trials: list[Trial]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise MissingExtraError("optuna", "search", "search") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A new sampler for each trial: what it draws then follows from the trials before, after a resume too.
        seed = int(digest_json([settings.seed, name, len(trials)])[:8], 16)
        samplers = optuna.samplers
        sampler: Any = samplers.TPESampler(seed=seed) if settings.sampler == "tpe" else samplers.RandomSampler(seed)
        self._settings, self._trials = settings, trials
        self._distributions = {key: _distribution(optuna, values) for key, values in settings.space.items()}
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        states = {"done": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
        for trial in trials:
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=getattr(optuna.trial.TrialState, states[trial.state]),
                    value=trial.score,
                    params={key: _coded(value) for key, value in trial.values.items()},
                    distributions=self._distributions,
                    intermediate_values=dict(enumerate(trial.epochs)),
                )
            )

    def draw(self) -> dict[str, Any]:
        """Draw the values of the next trial."""
        drawn = self._study.ask(self._distributions).params
        return {key: _decoded(drawn[key], values) for key, values in self._settings.space.items()}

    def is_hopeless(self, epochs: list[float]) -> bool:
        """Return whether the best score so far is below the median of earlier trials' best at the same epoch.

        The median rule of Vizier (Golovin et al., KDD 2017), as Optuna's MedianPruner has it.
        """
        earlier = [max(trial.epochs[: len(epochs)]) for trial in self._trials if len(trial.epochs) >= len(epochs)]
        return len(earlier) >= _WARM_UP_TRIALS and max(epochs) < statistics.median(earlier)


def _distribution(optuna: Any, values: Any) -> Any:
    if isinstance(values, list):
        return optuna.distributions.CategoricalDistribution([_coded(value) for value in values])
    low, high = as_integer(values.low, values), as_integer(values.high, values)
    if isinstance(low, int):
        return optuna.distributions.IntDistribution(low, high, log=values.log)
    return optuna.distributions.FloatDistribution(low, high, log=values.log)


def _coded(value: Any) -> Any:
    """Return a value as Optuna takes it: lists and sections as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _decoded(drawn: Any, values: Any) -> Any:
    return drawn if not isinstance(values, list) else next(v for v in values if _coded(v) == drawn)
