"""SCMIL: sparse context-aware multiple instance learning.

Source: Yang et al., "SCMIL: Sparse Context-aware Multiple Instance Learning for Predicting Cancer Survival Probability
Distribution in Whole Slide Images", MICCAI 2024 (github.com/yang-ze-kang/SCMIL, commit ec6759a1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cfusion.errors import ConfigError
from cfusion.models.attention import AttentionPooling, attend
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.bag import Prepared, check_count, check_share
from cfusion.models.baselines import FinestBagModel
from cfusion.models.clusters import kmeans
from cfusion.models.dropout import Dropout
from cfusion.models.graph import require_positions
from cfusion.models.linear import Linear
from cfusion.models.time_mixture import LONGEST_MONTHS, PUBLISHED_SLACK, TimeMixture, TimeMixtureHead
from cfusion.types import BagBatch, SurvivalOutput

HEADS = 8
WIDTH = 256
"""Of the filter's and of the pooling's hidden layer; fixed in the published program, as the heads are."""

KMEANS_SEED, KMEANS_ITERATIONS = 1, 5


class ClusterAttention(nn.Module):
    """Self-attention among the tiles of a cluster, whose embeddings and places are alike; added to its input.

    Args:
        dim: Width of the tiles.
        cluster_size: Mean number of tiles in a cluster; one of twice as many is cut into equal pieces.
        feature_weight: Share of the embeddings, against the coordinates, in the distance between tiles.
        dropout: Of the attention weights and of the output.
        restore_order: Return the tiles in the order they came in, not in that of the clusters.
    """

    def __init__(
        self, dim: int, cluster_size: int, feature_weight: float, dropout: float, *, restore_order: bool
    ) -> None:
        super().__init__()
        self.cluster_size, self.feature_weight = cluster_size, feature_weight
        self.dropout, self.restore_order = dropout, restore_order
        self.query_key_value = Linear(dim, 3 * dim)
        self.out = nn.Sequential(Linear(dim, dim), Dropout(dropout))

    def forward(
        self, tiles: Float[Tensor, "tile dim"], places: Int[Tensor, "tile 2"]
    ) -> Float[Tensor, "tile dim"]:  # fmt: skip
        """Attend within the clusters of one bag; there may be no tile."""
        if not len(tiles):
            return self.out(self.query_key_value(tiles)[:, : tiles.shape[1]])
        order, windows, real = self.windows(self.labels(tiles, places))
        ordered = tiles[order]
        parts = self.query_key_value(ordered)[windows].unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        found = attend(query, key, value, real, self.dropout if self.training else 0.0)
        found = self.out(found.transpose(1, 2).flatten(2)[real]) + ordered
        return found[order.argsort()] if self.restore_order else found

    @torch.no_grad()
    def labels(self, tiles: Float[Tensor, "tile dim"], places: Int[Tensor, "tile 2"]) -> Int[Tensor, " tile"]:
        """Cluster the tiles by embedding and place."""
        if len(tiles) < 2:
            return torch.zeros(len(tiles), dtype=torch.long, device=tiles.device)
        near = (1 - self.feature_weight) * _standardised(places.to(tiles.dtype))
        alike = self.feature_weight * _standardised(tiles)
        clusters = max(1, len(tiles) // self.cluster_size)
        return kmeans(
            torch.cat([alike, near], dim=1), clusters, seed=KMEANS_SEED, iterations=KMEANS_ITERATIONS
        )[0]  # fmt: skip

    def windows(
        self, labels: Int[Tensor, " tile"]
    ) -> tuple[Int[Tensor, " tile"], Int[Tensor, "window place"], Bool[Tensor, "window place"]]:
        """Order the tiles by cluster and cut the order into windows.

        Returns:
            The order; the number in it of each place of a window; and whether there is a tile at the place.
        """
        order = labels.argsort(stable=True)
        sizes: list[int] = []
        for size in labels.bincount().tolist():
            pieces = max(1, size // self.cluster_size)
            sizes += [size // pieces + (piece < size % pieces) for piece in range(pieces)] if size else []
        length = torch.tensor(sizes, dtype=torch.long, device=labels.device)
        place = torch.arange(max(sizes, default=0), device=labels.device)
        real = place < length[:, None]
        start = length.cumsum(0) - length
        return order, torch.where(real, start[:, None] + place, 0), real


class SCMIL(FinestBagModel, Prepared):
    """A filter, attention within clusters of the tiles it keeps, gated attention pooling, and a mixture of times.

    The filter scales each tile by a weight from 0 to 1. Tiles with a weight above .5 attend to those of their cluster;
    all tiles are pooled. The output is a distribution of the time; the logits are those of its hazards in the time
    bins, whose edges `prepare` takes from the training patients. Training maximises the likelihood of the bin
    (`train.loss: nll`); the published program maximises the density at the time.

    Without two tiles above .5 there is no attention. Clusters have a fixed seed.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the tiles after the filter.
        magnifications: Those the data offer.
        cluster_size: See `ClusterAttention`.
        feature_weight: See `ClusterAttention`.
        layers: Layers of attention within clusters.
        components: Components of the mixture.
        head_width: Width of the mixture's hidden layers.
        dropout: Of the projection, the attention, the pooling and the mixture.
        as_published: Do as the published program: no projection of the tiles, which keep the width of the embeddings; a
            second layer reads the tiles in the order of the first one's clusters, their coordinates in the order of
            the file; dropout of .1 in the mixture; 1e-6 added in the transformation of time.
    """

    edges_months: Tensor
    in_months = ("edges_months",)

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        embed_dim: int,
        magnifications: Sequence[float],
        cluster_size: int = 64,
        feature_weight: float = 0.8,
        layers: int = 1,
        components: int = 100,
        head_width: int = 256,
        dropout: float = 0.25,
        as_published: bool = False,
    ) -> None:
        super().__init__(backbone_dim, magnifications)
        dim = backbone_dim if as_published else embed_dim
        if dim % HEADS:
            name = "The width of the embeddings" if as_published else "model.embed_dim"
            raise ConfigError(f"{name} is {dim}: scmil has {HEADS} heads, which must divide it.")
        counts = {
            "cluster_size": cluster_size, "layers": layers, "components": components, "head_width": head_width
        }  # fmt: skip
        for option, value in counts.items():
            check_count(option, value)
        if not isinstance(feature_weight, int | float) or not 0 <= feature_weight <= 1:
            raise ConfigError(f"model.options.feature_weight={feature_weight!r}: expected a number from 0 to 1.")
        check_share("dropout", dropout)
        self.gate = nn.Sequential(Linear(backbone_dim, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
        projection = nn.Sequential(Linear(backbone_dim, dim), nn.GELU(), Dropout(dropout))
        self.embed = nn.Identity() if as_published else projection
        self.layers = nn.ModuleList(
            ClusterAttention(dim, cluster_size, feature_weight, dropout, restore_order=not as_published)
            for _ in range(layers)
        )
        self.scores = AttentionScores(dim, WIDTH, dropout=dropout)
        self.pool = AttentionPooling()
        slack, head_dropout = (PUBLISHED_SLACK, 0.1) if as_published else (0.0, dropout)
        self.head = TimeMixtureHead(dim, head_width, components, head_dropout, slack)
        self.register_buffer("edges_months", torch.linspace(0, LONGEST_MONTHS, n_bins + 1))

    def prepare(self, bags: Iterable[BagBatch], count: int, *, edges_months: Sequence[float], seed: int) -> None:
        """Take the edges of the time bins; the bags are not read."""
        self.edges_months.copy_(torch.tensor(edges_months))

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        mixture = self.mixture(features, batch)
        return SurvivalOutput.from_logits(mixture.logits(self.edges_months.to(mixture.log_weights.dtype)))

    def mixture(self, features: dict[str, Tensor], batch: BagBatch) -> TimeMixture:
        """Compute the distribution of each bag's time."""
        (name,) = self.magnification_names
        places = require_positions(batch, name)
        mask = None if batch.masks is None else batch.masks[name]
        gate = self.gate(features[name]).sigmoid()
        tiles = self.embed(features[name] * gate)
        kept = gate.squeeze(2) > 0.5
        if mask is not None:
            kept = kept & mask
        attended = tiles.clone()
        for bag, chosen in enumerate(kept):
            # A layer that reads no tile has a gradient of zero, where a layer that is left out would have none.
            rows = chosen.nonzero().flatten() if chosen.sum() > 1 else places.new_empty(0)
            own = tiles[bag, rows]
            for layer in self.layers:
                own = layer(own, places[bag, rows])
            attended[bag, rows] = own.to(attended.dtype)
        pooled = self.pool(self.scores(attended), attended, mask).squeeze(1)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.to(self.head.mean.dtype))


def _standardised(values: Float[Tensor, "tile dim"]) -> Float[Tensor, "tile dim"]:
    """Subtract one mean and divide by one standard deviation, both over all entries."""
    return (values - values.mean()) / values.std().clamp_min(torch.finfo(values.dtype).tiny)
