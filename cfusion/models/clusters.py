"""Clusters of tiles: k-means that gives the same result for the same tiles and seed."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


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


@functools.cache
def _threads() -> Any:
    """Return the controller of the thread pools of the libraries loaded with scikit-learn; finding them takes long."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
