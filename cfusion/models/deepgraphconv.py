"""DeepGraphConv: three graph convolutions over tiles with similar embeddings, with gated attention over all of them.

Sources: Li et al., "Graph CNN for Survival Analysis on Whole Slide Pathological Images" (DeepGraphSurv), MICCAI 2018;
Xu et al., "How Powerful are Graph Neural Networks?" (GIN), ICLR 2019. The form compared in the study is that of
github.com/mahmoodlab/Patch-GCN, commit 823adda, class `DeepGraphConv_Surv`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from cfusion.errors import ConfigError
from cfusion.models.attention import AttentionPooling
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.bag import check_share
from cfusion.models.dropout import Dropout
from cfusion.models.graph import Edges, GraphModel, sum_of_messages
from cfusion.models.linear import Linear
from cfusion.types import SurvivalOutput


class SumConvolution(nn.Module):
    """(1 + epsilon) times a tile plus the sum of its neighbours, through a two-layer network (GIN, eq. 4.1).

    Args:
        backbone_dim: Width of the input.
        dim: Width of the output.

    Attributes:
        epsilon: Constant, not trained.
    """

    def __init__(self, backbone_dim: int, dim: int) -> None:
        super().__init__()
        self.epsilon = 0.0
        self.network = nn.Sequential(Linear(backbone_dim, dim), nn.ReLU(), Linear(dim, dim))

    def forward(self, tiles: Float[Tensor, "row dim"], edges: Edges) -> Float[Tensor, "row other"]:
        """Convolve the rows of a flattened batch."""
        return self.network((1 + self.epsilon) * tiles + sum_of_messages(tiles, edges))


class DeepGraphConv(GraphModel):
    """DeepGraphSurv in the form that Patch-GCN's authors compare with (Chen et al., MICCAI 2021).

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Twice the width of the layers, which is 256 in the program.
        magnifications: Magnifications that the data offer; it reads the finest.
        edges: `latent`, as in the paper, or `spatial`; see `GraphModel`.
        neighbours: Neighbours of a tile.
        dropout: Within and after the attention.
        as_published: Let tiles send to their neighbours, join the latent edges of later slides to the first, and fix
            the dropout within the attention at .25; see `GraphModel`.
    """

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        embed_dim: int,
        magnifications: Sequence[float],
        edges: str = "latent",
        neighbours: int = 8,
        dropout: float = 0.25,
        as_published: bool = False,
    ) -> None:
        super().__init__(backbone_dim, magnifications, edges, neighbours, as_published)
        check_share("dropout", dropout)
        if embed_dim % 2:
            raise ConfigError(
                f"embed_dim={embed_dim}: deepgraphconv has layers of half this width, so it must be even."
            )
        dim = embed_dim // 2
        self.convolutions = nn.ModuleList(SumConvolution(width, dim) for width in (backbone_dim, dim, dim))
        self.gated = AttentionScores(dim, dim, dropout=0.25 if as_published else dropout)
        self.pool = AttentionPooling()
        self.summary = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), Dropout(dropout))
        self.head = nn.Linear(dim, n_bins)

    def survival_of_graph(self, tiles: Tensor, mask: Tensor | None, edges: Edges) -> SurvivalOutput:
        """See `GraphModel`."""
        hidden = tiles.flatten(0, 1)
        for convolution in self.convolutions:
            hidden = convolution(hidden, edges).relu()
        hidden = hidden.unflatten(0, (len(tiles), -1))
        pooled = self.pool(self.gated(hidden), hidden, mask).squeeze(1)
        return SurvivalOutput.from_logits(self.head(self.summary(pooled)))
