"""Clusters of tiles: k-means that gives the same result for the same tiles and seed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cfusion.errors import DataError
from cfusion.types import BagBatch

TRAINING_TILES = 1 << 16
"""Maximum number of training tiles that shared centres are fitted on."""


def kmeans(
    tiles: Float[Tensor, "tile dim"], clusters: int, *, seed: int, iterations: int = 100
) -> tuple[Int[Tensor, " tile"], Float[Tensor, "cluster dim"]]:
    """Cluster tiles by Lloyd's algorithm, started by k-means++ (Arthur and Vassilvitskii, 2007).

    Computed on the CPU, without a gradient.

    Args:
        tiles: At least as many as clusters. If fewer of them differ, some clusters stay empty.
        clusters: Number of clusters.
        seed: Seed of the start.
        iterations: Maximum number of iterations.

    Returns:
        The cluster of each tile, and the centres, on the device of `tiles`.
    """
    from sklearn.cluster import KMeans

    values = tiles.detach().to("cpu", torch.float64 if tiles.dtype == torch.float64 else torch.float32).numpy()
    warnings.filterwarnings("ignore", "Number of distinct clusters", module="sklearn")
    # Several threads would add up a cluster's tiles in an order that changes from run to run.
    with _threads().limit(limits=1, user_api="openmp"):
        found = KMeans(clusters, n_init=1, max_iter=iterations, tol=1e-4, random_state=seed).fit(values)
    centres = torch.from_numpy(found.cluster_centers_).to(tiles.device, tiles.dtype)
    return torch.from_numpy(found.labels_).to(tiles.device, torch.long), centres


def shared_centres(
    bags: Iterable[BagBatch], count: int, name: str, clusters: int, *, option: str, seed: int
) -> Float[Tensor, "cluster dim"]:
    """Cluster an equal number of tiles of each training bag; return the centres, on the CPU.

    Args:
        bags: The training bags, one by one.
        count: Number of training bags.
        name: Magnification.
        clusters: Number of centres.
        option: The model's option that set this number, for errors.
        seed: Seed of the choice of tiles and of the start.

    Raises:
        DataError: The bags have fewer different tiles than clusters.
    """
    share, random = -(-TRAINING_TILES // count), np.random.RandomState(seed)
    parts = []
    for bag in bags:
        tiles = bag.features[name].flatten(0, 1)
        chosen = np.sort(random.permutation(len(tiles))[:share])
        parts.append(tiles[torch.from_numpy(chosen).to(tiles.device)].float().cpu())
    tiles = torch.cat(parts)
    different = len(tiles)
    if different >= clusters:
        labels, centres = kmeans(tiles, clusters, seed=seed, iterations=50)
        different = len(labels.unique())
    if different < clusters:
        raise DataError(
            f"model.options.{option}={clusters}, but the {count} training bags have only {different} different tiles "
            f"at {name}.",
            f"Set model.options.{option} lower, or train on more slides.",
        )
    return centres


@functools.cache
def _threads() -> Any:
    """Return the controller of the thread pools of the libraries loaded with scikit-learn; finding them takes long."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
