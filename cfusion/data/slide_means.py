"""Mean embeddings of slides, one read of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cfusion.config import DataConfig
from cfusion.data.loader import BagSet
from cfusion.data.shards import ShardDataset
from cfusion.types import magnification_names


def slide_means(
    dataset: ShardDataset, slides: Sequence[str], data: DataConfig, magnifications: Sequence[float]
) -> dict[str, np.ndarray]:
    """Return the mean embedding of each slide, f32 [magnification, dim], finest magnification first.

    Raises:
        ShardsError: A slide or a magnification is missing.
    """
    if not slides:
        return {}
    plain = data.model_copy(update={"unit": "slide", "cache": "page", "max_tiles": None})
    bags = BagSet.open(
        dataset, {slide: (slide,) for slide in slides}, plain,
        magnifications=magnifications, device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    names = magnification_names(magnifications)
    stream = bags.loader.stream([[i] for i in range(len(bags))], epoch=0, training=False)
    return {
        bag.key: np.array([batch.features[name][0].mean(dim=0).numpy() for name in names])
        for bag, batch in zip(bags.bags, stream, strict=True)
    }
