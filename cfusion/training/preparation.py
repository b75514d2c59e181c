"""Sets what a model takes from the training bags of its fold before the first step, such as prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cfusion.data.loader import BagSet
from cfusion.errors import ConfigError
from cfusion.files import digest_json
from cfusion.models.bag import Prepared
from cfusion.survival.bins import TimeBins
from cfusion.training.runtime import Runtime


def prepare(runtime: Runtime, network: nn.Module, train: BagSet, bins: Sequence[TimeBins], name: str) -> None:
    """Let a model set its buffers from the training bags; nothing happens for other models. Every rank must call this.

    Rank 0 reads the bags, with all their tiles, and the others receive its buffers. A resumed fold does it again, with
    the same result, and then loads its checkpoint.

    Args:
        runtime: The processes.
        network: The model with its initial weights, on the CPU.
        train: Training bags.
        bins: Time bins of each cohort.
        name: Name of the fold, which decides the seed.

    Raises:
        ConfigError: The model has times in months, and there are several cohorts.
        DataError: The training bags do not suffice.
    """
    if not isinstance(network, Prepared):
        return
    if network.in_months and len(bins) > 1:
        raise ConfigError(
            f"{type(network).__name__} predicts a distribution of the time in months, which {len(bins)} cohorts do not "
            "share.",
            "Train it on one cohort, or choose another model for several.",
        )
    problem: Exception | None = None
    if runtime.is_main:
        bags = train.loader.stream(([i] for i in range(len(train))), epoch=0, training=False)
        seed = int(digest_json(["preparation", name])[:7], 16)
        try:
            with torch.no_grad():
                network.prepare(bags, len(train), edges_months=bins[0].edges, seed=seed)
        except Exception as error:  # noqa: BLE001 - raised again below, on every rank
            problem = error
    problem = runtime.from_main(problem)
    if problem is not None:
        raise problem
    buffers = runtime.from_main(dict(network.named_buffers()))
    with torch.no_grad():
        for key, buffer in network.named_buffers():
            buffer.copy_(buffers[key])
