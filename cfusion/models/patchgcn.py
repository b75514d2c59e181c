"""Patch-GCN: a deep graph convolution over neighbouring tiles, with gated attention over all of them.

Sources: Chen et al., "Whole Slide Images are 2D Point Clouds", MICCAI 2021, section 2; Li et al., "DeeperGCN", 2020.
The published program is github.com/mahmoodlab/Patch-GCN, commit 823adda, class `PatchGCN_Surv`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cfusion.errors import ConfigError
from cfusion.models.attention import AttentionPooling
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.bag import check_share
from cfusion.models.dropout import Dropout
from cfusion.models.graph import Edges, GraphModel, softmax_of_messages
from cfusion.models.linear import Linear
from cfusion.types import SurvivalOutput

LAYERS = 3
"""Graph convolutions; their outputs and their input are concatenated."""


class SoftmaxConvolution(nn.Module):
    """A tile plus a softmax-weighted mean of its neighbours, through a two-layer network (DeeperGCN, section 3.2).

    Args:
        dim: Width of the tiles.
        bias: Whether the linear layers have biases.
    """

    def __init__(self, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.inverse_temperature = nn.Parameter(torch.ones(1))
        self.expand = Linear(dim, 2 * dim, bias=bias)
        self.norm = nn.LayerNorm(2 * dim)
        self.contract = Linear(2 * dim, dim, bias=bias)

    def forward(self, tiles: Float[Tensor, "row dim"], edges: Edges) -> Float[Tensor, "row dim"]:
        """Convolve the rows of a flattened batch."""
        mean = softmax_of_messages(tiles.relu() + 1e-7, self.inverse_temperature, edges)
        return self.contract(self.norm(self.expand(tiles + mean)).relu())


class PatchGCN(GraphModel):
    """Patch-GCN (Chen et al., MICCAI 2021).

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the concatenated layers; each has a quarter, 128 of 512 in the paper.
        magnifications: Magnifications that the data offer; it reads the finest.
        edges: `spatial`, as in the paper, or `latent`; see `GraphModel`.
        neighbours: Neighbours of a tile; 8 in the paper.
        dropout: After the first layer, before, within and after the attention.
        as_published: Let tiles send to their neighbours; see `GraphModel`.
    """

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        embed_dim: int,
        magnifications: Sequence[float],
        edges: str = "spatial",
        neighbours: int = 8,
        dropout: float = 0.25,
        as_published: bool = False,
    ) -> None:
        super().__init__(backbone_dim, magnifications, edges, neighbours, as_published)
        check_share("dropout", dropout)
        if embed_dim % (LAYERS + 1):
            raise ConfigError(f"embed_dim={embed_dim}: patchgcn concatenates {LAYERS + 1} layers, so 4 must divide it.")
        dim = embed_dim // (LAYERS + 1)
        self.embed = nn.Sequential(Linear(backbone_dim, dim), nn.ReLU(), Dropout(dropout))
        self.convolutions = nn.ModuleList(SoftmaxConvolution(dim) for _ in range(LAYERS))
        # The program also makes a norm for the first layer, and never uses it.
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(LAYERS - 1))
        self.joint = nn.Sequential(Linear(embed_dim, embed_dim), nn.ReLU(), Dropout(dropout))
        self.gated = AttentionScores(embed_dim, embed_dim, dropout=dropout)
        self.pool = AttentionPooling()
        self.summary = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), Dropout(dropout))
        self.head = nn.Linear(embed_dim, n_bins)

    def survival_of_graph(self, tiles: Tensor, mask: Tensor | None, edges: Edges) -> SurvivalOutput:
        """See `GraphModel`."""
        bags = len(tiles)
        hidden = self.embed(tiles).flatten(0, 1)
        layers = [hidden, self.convolutions[0](hidden, edges)]
        for convolution, norm in zip(list(self.convolutions)[1:], self.norms, strict=True):
            layers.append(layers[-1] + norm(convolution(layers[-1], edges)).relu())
        joint = self.joint(torch.cat(layers, dim=1).unflatten(0, (bags, -1)))
        pooled = self.pool(self.gated(joint), joint, mask).squeeze(1)
        return SurvivalOutput.from_logits(self.head(self.summary(pooled)))
