"""Attention MIL as Patho-Bench fine-tunes it.

Sources: Ilse et al., "Attention-based Deep MIL", ICML 2018; Zhang et al., Patho-Bench
(github.com/mahmoodlab/Patho-Bench, commit 660e7704), whose layers are TRIDENT's (github.com/mahmoodlab/TRIDENT, commit
a91fa849).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cfusion.models.attention import AttentionPooling
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.bag import check_count, check_share
from cfusion.models.baselines import PackingBagModel
from cfusion.models.dropout import Dropout
from cfusion.models.linear import Linear
from cfusion.models.segments import Real
from cfusion.types import SurvivalOutput

LAYER_DROPOUT = 0.1
"""Around the pooling; fixed in the published program."""


class ABMIL(PackingBagModel):
    """Linear, GELU, attention pooling, linear, GELU, linear; hidden layers are as wide as the embeddings.

    For the Cox loss set `train.loss: cox`. The published program pools each slide of a patient separately and averages
    their features; here a patient's slides are one bag, or separate bags with `data.unit: slide`.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of each attention head's hidden layer.
        magnifications: Those the data offer.
        gated: Whether the attention is gated. The published settings file has no gate.
        heads: Number of poolings; with several, a linear layer condenses their joined features.
        dropout: Inside the attention.
    """

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        embed_dim: int,
        magnifications: Sequence[float],
        gated: bool = True,
        heads: int = 1,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(backbone_dim, magnifications)
        check_count("heads", heads)
        check_share("dropout", dropout)
        self.summaries = heads
        self.before = _hidden_layer(backbone_dim)
        self.scores = nn.ModuleList(
            AttentionScores(backbone_dim, embed_dim, gated=gated, dropout=dropout) for _ in range(heads)
        )
        self.pool = AttentionPooling()
        self.condense = Linear(heads * backbone_dim, backbone_dim) if heads > 1 else nn.Identity()
        self.after = _hidden_layer(backbone_dim)
        self.head = nn.Linear(backbone_dim, n_bins)

    def survival_of(self, tiles: Tensor, mask: Real) -> SurvivalOutput:
        """See `FinestBagModel`."""
        hidden = self.before(tiles)
        scores = torch.cat([score(hidden) for score in self.scores], dim=1)
        pooled = self.condense(self.pool(scores, hidden, mask).flatten(1))
        return SurvivalOutput.from_logits(self.head(self.after(pooled)))


def _hidden_layer(dim: int) -> nn.Sequential:
    return nn.Sequential(Linear(dim, dim), nn.GELU(), Dropout(LAYER_DROPOUT))
