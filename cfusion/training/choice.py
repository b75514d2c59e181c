"""Choice of the epoch: validation scores, the best epoch so far, and the end of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from cfusion.config import TrainConfig
from cfusion.data.loader import BagSet
from cfusion.errors import ConfigError, DataError
from cfusion.survival.losses import LOSSES
from cfusion.survival.metrics import concordance
from cfusion.training.checkpoint import TrainState
from cfusion.training.fold_job import FoldJob, targets_of
from cfusion.training.inference import patient_survival
from cfusion.training.snapshot import Snapshot
from cfusion.types import SurvivalOutput


def finish_epoch(
    job: FoldJob,
    state: TrainState,
    snapshot: Snapshot,
    metrics: dict[str, float],
    parameters: Callable[[], Mapping[str, Tensor]],
) -> None:
    """Record the metrics of the current epoch, keep its parameters if it is the best, and move to the next epoch.

    Args:
        job: The training job.
        state: Gets the row of history, and the score if it is the best.
        snapshot: Gets the parameters of the best epoch.
        metrics: Metrics of the epoch, with `validation_cindex` and `validation_loss` if bags choose the epoch.
        parameters: Returns a copy of the evaluated parameters.

    Raises:
        DataError: The score is not finite.
    """
    if is_best(state, metrics, job):
        snapshot.best = dict(parameters())
    state.history.append({"epoch": state.epoch, **metrics})
    state.epoch, state.samples_seen, state.loss_sum = state.epoch + 1, 0, 0.0


def has_ended(state: TrainState, train: TrainConfig) -> bool:
    """Whether the maximum number of epochs or the patience is reached."""
    return state.epoch >= train.epochs or out_of_patience(state, train.patience)


def chosen_parameters(state: TrainState, snapshot: Snapshot, train: TrainConfig) -> dict[str, Tensor]:
    """Return the parameters of the chosen epoch after the end of training.

    Raises:
        ConfigError: No epoch could be chosen.
    """
    if not snapshot.best:
        raise ConfigError(
            f"No epoch was chosen: train.min_epoch={train.min_epoch}, but training ended after {state.epoch} epochs.",
            "Raise train.epochs or lower train.min_epoch.",
        )
    return snapshot.best


def validation_scores(job: FoldJob, bags: BagSet, logits: Tensor) -> dict[str, float]:
    """Compute the C-index over patients and the loss over bags; alpha is 0 here, as in the published program.

    Of several cohorts, only pairs of patients of the same one count.
    """
    loss = LOSSES[job.config.train.loss](SurvivalOutput.from_logits(logits), targets_of(job, bags), alpha=0.0)
    survival = patient_survival(logits, bags)
    cases = job.cases.loc[survival.index]
    scored = concordance(
        cases["time_months"].to_numpy(), cases["event"].to_numpy(), -survival.sum(axis=1).to_numpy(),
        cases["stratum"].to_numpy() if "stratum" in cases else None,
    )  # fmt: skip
    return {"validation_loss": loss.mean().item(), "validation_cindex": scored.cindex}


def is_best(state: TrainState, metrics: dict[str, float], job: FoldJob) -> bool:
    """Whether the current epoch is the best so far; without validation bags the latest is the best.

    If it is, its score is recorded in `state`.

    Raises:
        DataError: The score is not finite.
    """
    train = job.config.train
    if job.validation is None:
        score = float(state.epoch)
    else:
        score = metrics["validation_cindex"] if train.monitor == "cindex" else -metrics["validation_loss"]
    if not math.isfinite(score):
        raise DataError(
            f"The validation score of epoch {state.epoch} is not finite.", "Lower train.lr.", topic="not-finite"
        )
    if state.epoch < train.min_epoch or (state.best_score is not None and score <= state.best_score):
        return False
    state.best_score, state.best_epoch = score, state.epoch
    return True


def out_of_patience(state: TrainState, patience: int | None) -> bool:
    """Whether `patience` epochs have passed without a better validation score."""
    return patience is not None and state.best_score is not None and state.epoch - 1 - state.best_epoch >= patience
