"""What is trained on what: the job of one fold, and the outcomes of its bags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cfusion.config import Config
from cfusion.data.loader import BagSet
from cfusion.survival.bins import TimeBins
from cfusion.types import Targets


@dataclass(frozen=True)
class FoldJob:
    """One training: a configuration, its bags, and where its state lives.

    Attributes:
        config: The run's configuration.
        train: Training bags.
        validation: Bags that choose the epoch; None under `fixed-epoch`.
        cases: Outcomes by patient: `time_months`, `event`.
        bins: Time bins of the training patients.
        sampling_weights: [bag], for `sampling: weighted`; None otherwise.
        name: Of the training among those of other seeds and folds; its dropout follows from it.
        identity: All of this as plain values, for checkpoints.
        card: What the model is, for whoever reads a checkpoint without the run.
        folder: Where checkpoints go.
        on_epoch: Called on rank 0 with each finished epoch's number and metrics.
    """

    config: Config
    train: BagSet
    validation: BagSet | None
    cases: pd.DataFrame
    bins: TimeBins
    sampling_weights: np.ndarray | None
    name: str
    identity: dict[str, Any]
    card: dict[str, Any]
    folder: Path
    on_epoch: Callable[[int, dict[str, float]], None]


def targets_of(job: FoldJob, bags: BagSet) -> Targets:
    """Outcomes of the patients of `bags`, [bag]."""
    rows = job.cases.loc[[bag.case_id for bag in bags.bags]]
    return Targets(
        torch.as_tensor(job.bins.label(rows["time_months"].to_numpy())),
        torch.tensor(rows["event"].to_numpy(dtype=bool)),
        torch.tensor(rows["time_months"].to_numpy(dtype=float)),
    )
