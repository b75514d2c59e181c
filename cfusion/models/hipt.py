"""HIPT from given embeddings: tiles are summarised by region, and regions by slide.

Source: Chen et al., "Scaling Vision Transformers to Gigapixel Images via Hierarchical Self-Supervised Learning", CVPR
2022. The published program is github.com/mahmoodlab/HIPT, commit 780fafa, whose classes `HIPT_LGP_FC` and `HIPT_GP_FC`
are classifiers; the hazards here are this program's. The first stage of HIPT, from pixels to tiles, is an encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cfusion.models.attention import AttentionPooling, QueryKeyValue, SelfAttention, attend
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.bag import TileView, check_choice, check_count, check_share
from cfusion.models.baselines import FinestBagModel
from cfusion.models.dropout import Dropout
from cfusion.models.families import regions_of
from cfusion.models.linear import Linear
from cfusion.types import BagBatch, SurvivalOutput

WIDTH = 192
"""Width of region tokens, the only one that the published program runs with."""

LOCAL_BLOCKS, LOCAL_HEADS, GLOBAL_LAYERS, GLOBAL_HEADS = 6, 6, 2, 3

PUBLISHED_SIDE = 14
"""Side of the published position embeddings, which are stretched to the region's."""

TOKENS_AT_ONCE = 1 << 13
"""Tiles whose regions are summarised at once in training; their activations are computed again going backward."""


class RegionBlock(nn.Module):
    """Pre-norm transformer block within regions (HIPT, section 3.2).

    Args:
        dim: Width of the tokens.
        heads: Attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.query_key_value = QueryKeyValue(dim)
        self.out = Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feed_forward = nn.Sequential(Linear(dim, 4 * dim), nn.GELU(), Linear(4 * dim, dim))

    def forward(
        self, tokens: Float[Tensor, "region token dim"], mask: Bool[Tensor, "region token"] | None
    ) -> Float[Tensor, "region token dim"]:
        """Transform the tokens of each region; `mask` is true where a token is real."""
        parts = self.query_key_value(self.attention_norm(tokens))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        tokens = tokens + self.out(attend(query, key, value, mask).transpose(1, 2).flatten(2))
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class RegionTransformer(nn.Module):
    """Summary of the tiles of a region by a vision transformer's class token (HIPT, section 3.2).

    Args:
        backbone_dim: Width of the tiles.
        side: Tiles along the side of a region.
        embedded_side: Side of the square of position embeddings; if it is another, they are stretched.
    """

    def __init__(self, backbone_dim: int, side: int, embedded_side: int) -> None:
        super().__init__()
        self.side, self.embedded_side = side, embedded_side
        self.embed = nn.Sequential(Linear(backbone_dim, WIDTH), nn.GELU())
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(WIDTH), std=0.02))
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1 + embedded_side**2, WIDTH), std=0.02))
        self.blocks = nn.ModuleList(RegionBlock(WIDTH, LOCAL_HEADS) for _ in range(LOCAL_BLOCKS))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(
        self, tiles: Float[Tensor, "region slot dim"], mask: Bool[Tensor, "region slot"]
    ) -> Float[Tensor, "region width"]:
        """Return one token for each region; `mask` is true where a place holds a tile."""
        positions = self._positions()
        tokens = self.embed(tiles) + positions[1:]
        first = (self.class_token + positions[0]).to(tokens.dtype).expand(len(tokens), 1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        where = None if bool(mask.all()) else F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            tokens = block(tokens, where)
        return self.norm(tokens[:, 0])

    def _positions(self) -> Float[Tensor, "token width"]:
        if self.side == self.embedded_side:
            return self.positions
        square = self.positions[1:].T.reshape(1, WIDTH, self.embedded_side, self.embedded_side)
        # DINO adds .1 against rounding down, which moves the sampled places a little.
        scale = (self.side + 0.1) / self.embedded_side
        stretched = F.interpolate(square, scale_factor=scale, mode="bicubic")
        return torch.cat([self.positions[:1], stretched.flatten(2)[0].T])


class RegionMean(nn.Module):
    """Mean of the tiles of a region."""

    def forward(
        self, tiles: Float[Tensor, "region slot dim"], mask: Bool[Tensor, "region slot"]
    ) -> Float[Tensor, "region dim"]:
        """Return one token for each region; `mask` is true where a place holds a tile."""
        return (tiles * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


class SlideLayer(nn.Module):
    """Post-norm transformer layer over regions.

    Args:
        dropout: Of the attention weights, and after the attention and each linear map.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(WIDTH, GLOBAL_HEADS, dropout)
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Sequential(
            Linear(WIDTH, WIDTH), nn.ReLU(), Dropout(dropout), Linear(WIDTH, WIDTH), Dropout(dropout)
        )
        self.feed_forward_norm = nn.LayerNorm(WIDTH)
        self.dropout = Dropout(dropout)

    def forward(
        self, regions: Float[Tensor, "bag region dim"], mask: Bool[Tensor, "bag region"] | None
    ) -> Float[Tensor, "bag region dim"]:
        """Transform the regions of each bag; `mask` is true where a region is real."""
        regions = self.attention_norm(regions + self.dropout(self.attention(regions, mask)))
        return self.feed_forward_norm(regions + self.feed_forward(regions))


class HIPT(FinestBagModel):
    """HIPT's region and slide stages (Chen et al., CVPR 2022). Its sizes are fixed at the published ones.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        magnifications: Magnifications that the data offer; it reads the finest.
        region: How a region is summarised: `transformer`, as in the paper, which trains it beforehand without labels;
            `mean` of its tiles.
        side: Tiles along the side of a region: 4 of 20x are a tile of 5x; 16 are the 4096 px of the paper.
        dropout: Of the slide stage.
        as_published: Stretch position embeddings of 14 × 14 tiles to the region, and start both layers of the slide
            stage from the same weights, as the program does.
    """

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        magnifications: Sequence[float],
        region: str = "transformer",
        side: int = 4,
        dropout: float = 0.25,
        as_published: bool = False,
    ) -> None:
        super().__init__(backbone_dim, magnifications)
        check_choice("region", region, ("transformer", "mean"))
        check_count("side", side)
        check_share("dropout", dropout)
        self.side = side
        self.region: nn.Module = RegionMean()
        if region == "transformer":
            self.region = RegionTransformer(backbone_dim, side, PUBLISHED_SIDE if as_published else side)
        width = WIDTH if region == "transformer" else backbone_dim
        self.embed = nn.Sequential(Linear(width, WIDTH), nn.ReLU(), Dropout(dropout))
        self.layers = nn.ModuleList(SlideLayer(dropout) for _ in range(GLOBAL_LAYERS))
        if as_published:
            for layer in list(self.layers)[1:]:
                layer.load_state_dict(self.layers[0].state_dict())
        self.gated = AttentionScores(WIDTH, WIDTH, dropout=dropout)
        self.pool = AttentionPooling()
        self.summary = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), Dropout(dropout))
        self.head = nn.Linear(WIDTH, n_bins)

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        (name,) = self.magnification_names
        rows = regions_of(batch, name, self.side)
        mask = (rows >= 0).any(dim=2)
        regions = self.embed(self._summaries(features[name], rows, mask))
        where = None if bool(mask.all()) else mask
        for layer in self.layers:
            regions = layer(regions, where)
        pooled = self.pool(self.gated(regions), regions, where).squeeze(1)
        return SurvivalOutput.from_logits(self.head(self.summary(pooled)))

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """See `BagModel`."""
        (name,) = self.magnification_names
        (rows,) = regions_of(bag, name, self.side)
        return _RegionView(name, int(block == "pool"), tiles=bag.features[name].shape[1], rows=rows)

    def _summaries(
        self,
        tiles: Float[Tensor, "bag tile dim"],
        rows: Int[Tensor, "bag region slot"],
        mask: Bool[Tensor, "bag region"],
    ) -> Float[Tensor, "bag region width"]:
        """Summarise the regions, some at a time; zeros where a bag has none."""
        bag = mask.nonzero()[:, 0]
        size = max(1, TOKENS_AT_ONCE // rows.shape[2])
        parts = []
        for of_bag, of_region in zip(bag.split(size), rows[mask].split(size), strict=True):
            real = of_region >= 0
            held = tiles[of_bag[:, None], of_region.clamp_min(0)] * real[..., None]
            if torch.is_grad_enabled() and len(bag) > size:
                parts.append(checkpoint(self.region, held, real, use_reentrant=False))
            else:
                parts.append(self.region(held, real))
        found = torch.cat(parts)
        return found.new_zeros(*mask.shape, found.shape[1]).masked_scatter(mask[..., None], found)


@dataclass(frozen=True)
class _RegionView(TileView):
    """Keys are regions.

    Attributes:
        rows: [region, slot], the tiles of each region; −1 where there is none.
    """

    rows: Int[Tensor, "region slot"] | None = None

    @property
    def across(self) -> bool:
        """Queries are a summary, or the same regions."""
        return False

    def fold(self, weights: Float[Tensor, "head query key"]) -> Float[Tensor, "head query tile"]:
        """See `TileView`; the weight of a region is shared equally by its tiles."""
        assert self.rows is not None
        index = torch.where(self.rows < 0, self.tiles, self.rows)
        shared = (weights / (self.rows >= 0).sum(dim=1))[..., None].expand(*weights.shape, index.shape[1])
        folded = weights.new_zeros(*weights.shape[:2], self.tiles + 1)
        return folded.index_add_(2, index.flatten(), shared.flatten(2))[..., :-1]
