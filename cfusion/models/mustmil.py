"""MuSTMIL: multi-scale task multiple instance learning.

Source: Marini et al., "Multi-Scale Task Multiple Instance Learning for the Classification of Digital Pathology Images
with Global Annotations", COMPAY 2021 (github.com/ilmaro8/MuSTMIL, commit fd9d726b). The published program classifies
findings; the survival head, whose classes are time bins, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.attention import AttentionPooling
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.bag import BagModel, TileView, check_magnifications
from cfusion.models.linear import Linear
from cfusion.models.pairing import check_nested, paired, paired_view, rows_above
from cfusion.types import BagBatch, SurvivalOutput


class MuSTMIL(BagModel):
    """Attention pooling at each magnification and over the tiles of all magnifications joined.

    Each tile of the finest magnification is paired with the tiles that contain it at the others. Every magnification
    has an output, and so have all together, which predicts; the loss is the mean over all of them (their sum in the
    published program). The attention has one row for each time bin.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the embedded tiles; the attention has half of it. Published: 128 with ResNet-34, 256 with
            ResNet-50.
        magnifications: Those the data offer; all are read.
    """

    def __init__(self, *, backbone_dim: int, n_bins: int, embed_dim: int, magnifications: Sequence[float]) -> None:
        check_magnifications(magnifications)
        super().__init__(magnifications, magnifications, backbone_dim)
        check_nested(self.magnification_names)
        scales, self.n_bins = len(magnifications), n_bins
        self.embed = nn.ModuleList(Linear(backbone_dim, embed_dim) for _ in range(scales))
        self.scores = nn.ModuleList(_scores(embed_dim, embed_dim // 2, n_bins) for _ in range(scales))
        self.heads = nn.ModuleList(nn.Linear(n_bins * embed_dim, n_bins) for _ in range(scales))
        self.joint_scores = _scores(scales * embed_dim, embed_dim // 2, n_bins)
        # One for each magnification, all with the joint scores, so that each shows how its own tiles were read.
        self.pools = nn.ModuleList(AttentionPooling() for _ in range(scales))
        self.joint_head = nn.Linear(n_bins * scales * embed_dim, n_bins)

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """See `BagModel`."""
        return paired_view(block, bag, self.magnification_names, self.n_bins)

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        finest = self.magnification_names[0]
        mask = None if batch.masks is None else batch.masks[finest]
        tiles = [embed(features[name]) for embed, name in zip(self.embed, self.magnification_names, strict=True)]
        for scale, name in enumerate(self.magnification_names[1:], 1):
            tiles[scale] = paired(tiles[scale], rows_above(batch, finest, name))
        branches = tuple(
            head((_weights(scores(own), mask) @ own).flatten(1))
            for own, scores, head in zip(tiles, self.scores, self.heads, strict=True)
        )
        joint = self.joint_scores(torch.cat(tiles, dim=2))
        pooled = torch.cat([pool(joint, own, mask) for pool, own in zip(self.pools, tiles, strict=True)], dim=2)
        return SurvivalOutput.from_logits(self.joint_head(pooled.flatten(1)), branches=branches)


def _weights(
    scores: Float[Tensor, "bag row tile"], mask: Bool[Tensor, "bag tile"] | None
) -> Float[Tensor, "bag row tile"]:  # fmt: skip
    return F.softmax(scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf), dim=2)


def _scores(dim: int, width: int, rows: int) -> AttentionScores:
    return AttentionScores(dim, width, rows=rows, gated=False)
