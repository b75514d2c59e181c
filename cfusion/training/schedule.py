"""The learning rate as a pure function of the training position, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from cfusion.config import Config, TrainConfig
from cfusion.errors import ConfigError

PUBLISHED_HALF_PERIOD = 10
"""Epochs from the peak to 0 in the published program (`T_max` of its cosine annealing)."""


def learning_rate(train: TrainConfig, *, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0 over all epochs."""
    total = train.epochs * steps_per_epoch
    warmup = math.ceil(train.warmup_fraction * total)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "published":
        epoch = step // steps_per_epoch
        return train.lr * (1 + math.cos(math.pi * epoch / PUBLISHED_HALF_PERIOD)) / 2
    position = (step - warmup) / max(1, total - 1 - warmup)
    return train.lr * (train.final_lr + (1 - train.final_lr) * (1 + math.cos(math.pi * position)) / 2)


def steps_in_epoch(config: Config, bags: int) -> int:
    """Return the steps of an epoch over `bags` bags.

    Raises:
        ConfigError: With `train.published_errors` there is none, as a partial window makes no step.
    """
    batch = config.parallel.global_batch
    if not config.train.published_errors:
        return math.ceil(bags / batch)
    if bags < batch:
        raise ConfigError(
            f"{bags} training bags are fewer than parallel.global_batch={batch}: with train.published_errors=true, "
            "which carries the gradient of a partial window to the next epoch, no epoch has a step.",
            "Lower parallel.global_batch, or set train.published_errors=false.",
        )
    return bags // batch
