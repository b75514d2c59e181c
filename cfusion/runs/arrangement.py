"""Chooses how the folds of a run are trained on the cores of this machine, and says what that takes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cfusion.config import Config
from cfusion.data.shards import ShardDataset
from cfusion.extensions import OwnCode
from cfusion.machine_limits import memory_bytes
from cfusion.training.fitted import build

SHORT = 8192
"""Median tiles of a bag up to which several folds at once are faster than one after another, each on all cores."""

_PROGRAM_BYTES = 600 << 20
_COPIES = {"separate": 5, "side-by-side": 5, "together": 6}
"""Copies of a fold's parameters: weights, gradient, two moments, the best epoch's, and the one that is validated."""
_BAGS_AHEAD = {"separate": 1, "side-by-side": 1, "together": 16}
"""Bags that are in memory for a fold, or for all folds together."""
_ACTIVATIONS = 40
"""Values of the model's width per tile that a training step keeps, about."""


@dataclass(frozen=True)
class Arrangement:
    """How the folds of a run are trained.

    Attributes:
        folds: `separate`: one after another; `side-by-side`: several at once; `together`: all from one read of the
            shards per epoch.
        at_once: Folds that are in memory at the same time.
        threads: Cores of each fold.
        memory_bytes: Estimate of the memory that the run takes.
    """

    folds: Literal["separate", "side-by-side", "together"]
    at_once: int
    threads: int
    memory_bytes: int

    def describe(self) -> str:
        """Return it as a line for the terminal."""
        how = {"separate": "one after another", "side-by-side": f"{self.at_once} at once"}
        each = f"{self.threads} thread{'s' * (self.threads > 1)} each"
        return (
            f"training: folds {how.get(self.folds, f'all {self.at_once} together')}, {each}; about "
            f"{self.memory_bytes / 1e9:.1f} GB of memory"
        )


def arrange(
    config: Config, dataset: ShardDataset, folds: int, *, threads: int, one_cpu_process: bool, code: OwnCode | None
) -> Arrangement:
    """Choose the arrangement of a run's folds; `train.folds` decides unless it is `auto`.

    Args:
        config: The run.
        dataset: Its shards.
        folds: Number of folds to train.
        threads: Cores that torch uses.
        one_cpu_process: Whether the run is one process on a CPU.
        code: Code of the user's own model.
    """
    tiles = [sum(dataset.tiles(slide).values()) for slide in dataset.slide_ids]
    parameters = sum(parameter.numel() for parameter in blank_network(config, dataset, code).parameters())

    def made(kind: Literal["separate", "side-by-side", "together"], at_once: int, each: int) -> Arrangement:
        bag = max(tiles) * (config.model.embed_dim * _ACTIVATIONS + dataset.index.dim * _BAGS_AHEAD[kind]) * 4
        weights = parameters * 4 * (_COPIES[kind] + (config.train.ema is not None))
        return Arrangement(kind, at_once, each, _PROGRAM_BYTES + at_once * (weights + bag * config.train.micro_batch))

    wanted = config.train.folds
    if wanted == "together":
        return made("together", folds, 1 if one_cpu_process else threads)
    at_once = min(threads, folds) if one_cpu_process else 1
    side_by_side = made("side-by-side", at_once, threads // at_once)
    if wanted == "separate" or at_once == 1:
        return made("separate", 1, threads)
    # Not the free memory: a run that is resumed must be arranged as it was.
    fits = side_by_side.memory_bytes <= memory_bytes() // 2
    # A user's model may use PyTorch's own dropout, whose generator is shared by all threads.
    if wanted == "auto" and (code is not None or statistics.median(tiles) > SHORT or not fits):
        return made("separate", 1, threads)
    return side_by_side


def blank_network(config: Config, dataset: ShardDataset, code: OwnCode | None) -> nn.Module:
    """Return the run's model for its shapes; the program's own has no memory for its weights."""
    with torch.device("meta" if code is None else "cpu"):
        return build(config.model, dataset.index.dim, config.evaluation.n_bins, config.data.magnifications, code)
