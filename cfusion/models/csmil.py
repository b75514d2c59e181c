"""CS-MIL: cross-scale multi-instance learning.

Source: Deng et al., "Cross-scale Multi-instance Learning for Pathological Image Diagnosis", Medical Image Analysis 2024
(github.com/hrlblab/CS-MIL, commit e052cece). The published program has one sigmoid output for a diagnosis; the survival
head is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.attention import AttentionPooling
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.bag import BagModel, TileView, check_count, check_magnifications, check_share
from cfusion.models.clusters import kmeans
from cfusion.models.dropout import Dropout
from cfusion.models.linear import Linear
from cfusion.models.pairing import check_nested, paired, paired_view, rows_above
from cfusion.types import BagBatch, SurvivalOutput

SEED = 0
"""Of the clusters, as published."""


class CSMIL(BagModel):
    """A weighted sum of each tile with those that contain it, then attention pooling.

    Each tile of the finest magnification is paired with the tiles that contain it at the others; one network embeds and
    weighs all. The paper trains on bags that have equally many tiles of each k-means cluster of a slide, drawn with
    replacement, and averages 200 such bags in evaluation. Here a bag has all its tiles, and the attention of a tile is
    divided by the size of its cluster, which is the limit of large balanced bags.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        magnifications: Those the data offer; all are read. Published: three.
        width: Width of the embedded tiles; the other hidden layers have half of it.
        clusters: Number of clusters of the finest embeddings of a bag; 0: tiles are not balanced.
        dropout: Before the last layer.
        as_published: The weights of the magnifications are not normalised, as in the published program; else they are a
            softmax, as in the paper and in the program's class for toy data.
    """

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        magnifications: Sequence[float],
        width: int = 64,
        clusters: int = 8,
        dropout: float = 0.5,
        as_published: bool = False,
    ) -> None:
        check_magnifications(magnifications)
        check_share("dropout", dropout)
        check_count("clusters", clusters, least=0)
        check_count("width", width, least=2)
        super().__init__(magnifications, magnifications, backbone_dim)
        check_nested(self.magnification_names)
        self.clusters, self.as_published = clusters, as_published
        self.embed = nn.Sequential(Linear(backbone_dim, width), nn.ReLU())
        self.scale = nn.Sequential(Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1))
        self.scores = AttentionScores(width, width // 2, gated=False)
        # One for each magnification, all with the same scores, so that each shows how its own tiles were read.
        self.pools = nn.ModuleList(AttentionPooling() for _ in magnifications)
        self.head = nn.Sequential(
            Linear(width, width // 2), nn.ReLU(), Dropout(dropout), nn.Linear(width // 2, n_bins)
        )  # fmt: skip

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """See `BagModel`."""
        return paired_view(block, bag, self.magnification_names, 1)

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        finest = self.magnification_names[0]
        mask = None if batch.masks is None else batch.masks[finest]
        tiles = self._weighted(features, batch)
        scores = self.scores(torch.stack(tiles).sum(dim=0))
        if self.clusters:
            scores = scores - _log_cluster_sizes(features[finest], mask, self.clusters)[:, None]
        pooled = torch.stack([pool(scores, own, mask) for pool, own in zip(self.pools, tiles, strict=True)])
        return SurvivalOutput.from_logits(self.head(pooled.sum(dim=0).squeeze(1)))

    def _weighted(self, features: dict[str, Tensor], batch: BagBatch) -> list[Float[Tensor, "bag tile dim"]]:
        """Embed the tiles of each magnification, pair them and multiply them by their weights."""
        embedded = [self.embed(features[name]) for name in self.magnification_names]
        weights = [self.scale(own) for own in embedded]
        for number, name in enumerate(self.magnification_names[1:], 1):
            rows = rows_above(batch, self.magnification_names[0], name)
            embedded[number], weights[number] = paired(embedded[number], rows), paired(weights[number], rows)
        shares = torch.stack(weights, dim=3)
        if not self.as_published:
            shares = F.softmax(shares, dim=3)
        return [own * share for own, share in zip(embedded, shares.unbind(3), strict=True)]


def _log_cluster_sizes(
    tiles: Float[Tensor, "bag tile dim"], mask: Bool[Tensor, "bag tile"] | None, clusters: int
) -> Float[Tensor, "bag tile"]:
    """Compute the log of the number of tiles in each tile's cluster; 0 where padded."""
    sizes = tiles.new_ones(tiles.shape[:2])
    for bag, own in enumerate(tiles):
        real = slice(None) if mask is None else mask[bag]
        chosen = own[real]
        labels, _ = kmeans(chosen, min(clusters, len(chosen)), seed=SEED)
        sizes[bag, real] = labels.bincount()[labels].to(sizes.dtype)
    return sizes.log()
