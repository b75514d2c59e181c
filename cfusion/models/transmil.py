"""TransMIL: correlated MIL with a transformer whose attention is approximated by landmarks.

Sources: Shao et al., "TransMIL", NeurIPS 2021; Xiong et al., "Nyströmformer", AAAI 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.errors import ConfigError
from cfusion.models.attention import Attention, Visit, attend
from cfusion.models.bag import TileView, check_share
from cfusion.models.baselines import FinestBagModel
from cfusion.models.chunked_attention import attention_weights, query_chunks
from cfusion.models.dropout import Dropout
from cfusion.models.layers import PositionEncoding
from cfusion.models.linear import Linear
from cfusion.models.token_grid import TokenGrid, file_grid
from cfusion.types import BagBatch, SurvivalOutput


@dataclass(frozen=True)
class LandmarkLayout:
    """Place of each token of a batch when every bag is cut into the same number of equal segments.

    A bag's sequence is padded with zeros in front until its length is a multiple of the number of landmarks, as
    published: these zeros are keys like any other. Bags are aligned at their ends; places before a shorter bag's
    zeros are unseen.

    Attributes:
        landmarks: Number of segments.
        token: [bag, place], the token at each place; negative if there is none.
        place: [bag, token], the place of each token; 0 where the token is masked.
        segment: [bag, place], 0 … landmarks − 1; `landmarks` where the place is unseen.
        length: [bag], places in a segment.
    """

    landmarks: int
    token: Int[Tensor, "bag place"]
    place: Int[Tensor, "bag token"]
    segment: Int[Tensor, "bag place"]
    length: Int[Tensor, " bag"]

    @classmethod
    def of(cls, count: Int[Tensor, " bag"], tokens: int, landmarks: int) -> LandmarkLayout:
        """Build the layout of bags with `count` real tokens each, at the front of `tokens`."""
        length = (count + landmarks - 1) // landmarks
        places = -(-tokens // landmarks) * landmarks
        place = torch.arange(places, device=count.device)
        token = place - (places - count[:, None])
        inside = place - (places - landmarks * length[:, None])
        segment = torch.where(inside >= 0, inside // length[:, None], landmarks)
        own = torch.arange(tokens, device=count.device) + (places - count[:, None])
        return cls(landmarks, token, torch.where(own < places, own, 0), segment, length)

    def spread(self, tokens: Float[Tensor, "bag token dim"]) -> Float[Tensor, "bag place dim"]:
        """Put tokens at their places, zeros elsewhere."""
        index = self.token.clamp_min(0)[..., None].expand(-1, -1, tokens.shape[2])
        return tokens.gather(1, index) * (self.token >= 0)[..., None]

    def collect(self, places: Float[Tensor, "bag place dim"]) -> Float[Tensor, "bag token dim"]:
        """Read tokens from their places."""
        return places.gather(1, self.place[..., None].expand(-1, -1, places.shape[2]))

    def means(self, values: Float[Tensor, "bag head place dim"]) -> Float[Tensor, "bag head landmark dim"]:
        """Average over each segment."""
        bags, heads, _, dim = values.shape
        index = self.segment[:, None, :, None].expand_as(values)
        sums = values.new_zeros(bags, heads, self.landmarks + 1, dim).scatter_add(2, index, values)
        return sums[:, :, :-1] / self.length[:, None, None, None]


class NystromAttention(Attention):
    """Self-attention through landmarks (Nyströmformer, section 3), plus a convolution of the values.

    Args:
        dim: Width of the tokens.
        heads: Attention heads.
        dropout: After the output's linear map.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = Linear(dim, 3 * dim, bias=False)
        self.out = Linear(dim, dim)
        self.dropout = Dropout(dropout)
        self.value_conv = nn.Conv2d(heads, heads, (33, 1), padding=(16, 0), groups=heads, bias=False)

    def forward(self, tokens: Float[Tensor, "bag token dim"], layout: LandmarkLayout) -> Float[Tensor, "bag token dim"]:
        """Attend from each token through the means of the layout's segments."""
        projected = self.query_key_value(layout.spread(tokens))
        query, key, value = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query_marks, key_marks = layout.means(query), layout.means(key)
        scale = query.shape[3] ** -0.5
        between = F.softmax(query_marks @ key_marks.transpose(2, 3) * scale, dim=3)
        seen = layout.segment < layout.landmarks
        inverse = pseudo_inverse(between)
        summary = inverse @ attend(query_marks, key, value, seen)
        found = attend(query, key_marks, summary, None) + self.value_conv(value)
        if self.visit is not None:
            bias = torch.zeros_like(seen, dtype=key.dtype).masked_fill_(~seen, -torch.inf)[:, None, None]
            read = inverse @ attention_weights(query_marks * scale, key, bias)
            own = layout.collect(query.transpose(1, 2).flatten(2)).unflatten(2, (self.heads, -1)).transpose(1, 2)
            self._show(self.visit, own * scale, key_marks, read)
        return self.dropout(self.out(layout.collect(found.transpose(1, 2).flatten(2))))

    def _show(self, visit: Visit, query: Tensor, key_marks: Tensor, read: Tensor) -> None:
        """Compute the effective weights of tokens over places."""
        for rows in query_chunks(query.shape[2], read.shape[3], query.shape[0] * query.shape[1]):
            visit(rows, attention_weights(query[:, :, rows], key_marks, None) @ read)


def pseudo_inverse(matrix: Float[Tensor, "bag head row col"], iterations: int = 6) -> Float[Tensor, "bag head row col"]:
    """Compute the Moore–Penrose inverse by iteration (Nyströmformer, eq. 11), started from each bag's own norms."""
    magnitude = matrix.abs()
    rows = magnitude.sum(dim=3).amax(dim=(1, 2))
    columns = magnitude.sum(dim=2).amax(dim=(1, 2))
    inverse = matrix.transpose(2, 3) / (rows * columns)[:, None, None, None]
    identity = torch.eye(matrix.shape[3], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return inverse


class TransMIL(FinestBagModel):
    """TransMIL (Shao et al., NeurIPS 2021).

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the tokens; half as many landmarks, 8 heads, as published.
        magnifications: Those the data offer.
        dropout: After each attention.
    """

    def __init__(
        self, *, backbone_dim: int, n_bins: int, embed_dim: int, magnifications: Sequence[float], dropout: float = 0.1
    ) -> None:
        super().__init__(backbone_dim, magnifications)
        if embed_dim % 8:
            raise ConfigError(f"embed_dim={embed_dim}: transmil has 8 heads, which must divide it.")
        check_share("dropout", dropout)
        self.embed = nn.Sequential(Linear(backbone_dim, embed_dim), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(embed_dim))
        self.landmarks = embed_dim // 2
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(2))
        self.attentions = nn.ModuleList(NystromAttention(embed_dim, 8, dropout) for _ in range(2))
        self.position = PositionEncoding(embed_dim)
        self.position.kernels.draw_as_pytorch()
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, n_bins)

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """See `BagModel`."""
        (name,) = self.magnification_names
        tiles = bag.features[name].shape[1]
        return TileView(name, self.summaries, file_grid(1, tiles, None), tiles)

    def survival_of(self, tiles: Tensor, mask: Tensor | None) -> SurvivalOutput:
        """See `FinestBagModel`."""
        grid = file_grid(tiles.shape[0], tiles.shape[1], mask)
        tokens = grid.tokens(self.embed(tiles))
        tokens = torch.cat([self.class_token.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1)
        layout = LandmarkLayout.of(_token_counts(grid, tokens), tokens.shape[1], self.landmarks)
        tokens = tokens + self.attentions[0](self.norms[0](tokens), layout)
        tokens = self.position(tokens, grid)
        tokens = tokens + self.attentions[1](self.norms[1](tokens), layout)
        return SurvivalOutput.from_logits(self.head(self.norm(tokens[:, 0])))


def _token_counts(grid: TokenGrid, tokens: Tensor) -> Int[Tensor, " bag"]:
    """Count the real tokens of each bag, including the class token."""
    if grid.mask is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return grid.mask.sum(dim=1) + 1
