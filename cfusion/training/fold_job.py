"""The training job of one fold, and the outcomes of its bags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cfusion.config import Config
from cfusion.data.loader import BagSet
from cfusion.survival.bins import TimeBins
from cfusion.training.inference import PublishedEvaluation
from cfusion.types import Targets


def never_stop() -> bool:
    """Return False: only a signal stops the training."""
    return False


@dataclass(frozen=True)
class FoldJob:
    """One training run: a configuration, its bags, and the folder of its state.

    Attributes:
        config: The run's configuration.
        train: Training bags.
        validation: Bags that choose the epoch; None under `fixed-epoch`.
        cases: Outcomes by patient: `time_months`, `event`, and the time bin `label`, −1 in a cohort that does not
            train; with several cohorts also the number `stratum` of the patient's.
        bins: Time bins of each cohort by name, from its training patients; with `train.published_errors`, from all of
            its patients.
        sampling_weights: [bag], for `sampling: weighted`; None otherwise.
        name: Name of the run among other seeds and folds; its dropout depends on it.
        identity: All of this as plain values, for checkpoints.
        card: Model card, for readers of a checkpoint that do not have the run.
        folder: Folder for checkpoints.
        on_epoch: Called on rank 0 with each finished epoch's number and metrics.
        stop: Whether to save the state and stop, as after a signal; asked after every step.
    """

    config: Config
    train: BagSet
    validation: BagSet | None
    cases: pd.DataFrame
    bins: Mapping[str, TimeBins]
    sampling_weights: np.ndarray | None
    name: str
    identity: dict[str, Any]
    card: dict[str, Any]
    folder: Path
    on_epoch: Callable[[int, dict[str, float]], None]
    stop: Callable[[], bool] = never_stop

    def evaluation(self, epoch: int) -> PublishedEvaluation | None:
        """Return how the parameters of an epoch are evaluated if it is done as in the published program."""
        return PublishedEvaluation(self.name, epoch) if self.config.train.published_errors else None


def targets_of(job: FoldJob, bags: BagSet) -> Targets:
    """Return the outcomes of the patients of `bags`, [bag]."""
    rows = job.cases.loc[[bag.case_id for bag in bags.bags]]
    return Targets(
        torch.tensor(rows["label"].to_numpy(dtype=np.int64)),
        torch.tensor(rows["event"].to_numpy(dtype=bool)),
        torch.tensor(rows["time_months"].to_numpy(dtype=float)),
        torch.tensor(rows["stratum"].to_numpy(dtype=np.int64)) if "stratum" in rows else None,
    )
