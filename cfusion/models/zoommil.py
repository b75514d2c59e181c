"""ZoomMIL: attention selects tiles of a coarse magnification, and only their children are read at the next finer one.

Sources: Thandiackal et al., "Differentiable Zooming for Multiple Instance Learning on Whole-Slide Images", ECCV 2022;
Cordonnier et al., "Differentiable Patch Selection for Image Recognition", CVPR 2021. The published program is
github.com/histocartography/zoommil, commit da7bb7f, a classifier; the hazards here are this program's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cfusion.errors import ConfigError
from cfusion.models.attention import AttentionPooling
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.bag import BagModel, TileView, check_count, check_magnifications, check_positive, check_share
from cfusion.models.crossfusion import module_name
from cfusion.models.dropout import Dropout, random_normal
from cfusion.models.families import children_of, side_ratio
from cfusion.models.linear import Linear
from cfusion.types import BagBatch, SurvivalOutput, at_least_f32

DRAWS = 100
"""Perturbed selections of which training takes the mean."""


class ZoomMIL(BagModel):
    """ZoomMIL (Thandiackal et al., ECCV 2022).

    A bag's summary is the sum over magnifications of an attention-weighted mean of the tiles that were read. In
    training a selection is the mean of selections by perturbed attention, so what is read are mixtures of tiles.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the tiles; the attention has half of it.
        magnifications: Magnifications that the data offer; it zooms through all of them.
        selected: Tiles of a magnification whose children are read; 12 in the paper.
        sigma: Standard deviation of the noise on the attention, whose sum over a bag is 1; .002 in the paper.
        dropout: After the embedding and within the attention.
        as_published: Let a tile's attention learn only from where the same tile was selected, as the program does;
            the estimator of the paper also counts the tiles that it displaced. The program also needs no means: all
            its tiles have all their children.
    """

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        embed_dim: int,
        magnifications: Sequence[float],
        selected: int = 12,
        sigma: float = 0.002,
        dropout: float = 0.0,
        as_published: bool = False,
    ) -> None:
        check_magnifications(magnifications)
        super().__init__(magnifications, magnifications, backbone_dim)
        self.levels = self.magnification_names[::-1]
        _check(self.levels, selected, sigma)
        check_share("dropout", dropout)
        self.selected, self.sigma, self.as_published = selected, sigma, as_published

        def score() -> AttentionScores:
            return AttentionScores(embed_dim, embed_dim // 2, dropout=dropout)

        self.embed = nn.ModuleDict({
            module_name(name): nn.Sequential(Linear(backbone_dim, embed_dim), nn.ReLU(), Dropout(dropout))
            for name in self.levels
        })  # fmt: skip
        self.gated = nn.ModuleDict({module_name(name): score() for name in self.levels})
        self.pool = nn.ModuleDict({module_name(name): AttentionPooling() for name in self.levels})
        self.selectors = nn.ModuleDict({module_name(name): score() for name in self.levels[:-1]})
        self.head = nn.Linear(embed_dim, n_bins)

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        means = [self._pooled(level) for level in self._zoom(features, batch)]
        return SurvivalOutput.from_logits(self.head(torch.stack(means).sum(dim=0)))

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """See `BagModel`."""
        dtype = self.head.weight.dtype
        features = {name: bag.features[name].to(dtype) for name in self.levels}
        level = next(v for v in self._zoom(features, bag) if block == f"pool.{module_name(v.name)}")
        return TileView(level.name, 1, tiles=features[level.name].shape[1], rows=level.rows[0])

    def _zoom(self, features: dict[str, Tensor], batch: BagBatch) -> Iterator[_Level]:
        """Yield what is read of each magnification, coarse to fine."""
        name, *finer = self.levels
        tiles, rows = features[name], torch.arange(features[name].shape[1], device=features[name].device)
        mask = torch.ones_like(tiles[..., 0], dtype=torch.bool) if batch.masks is None else batch.masks[name]
        level = self._level(name, tiles, mask, rows.expand(mask.shape))
        yield level
        tables = _descendants(batch, self.levels)
        weights = self._select(level)
        below = [_Mixtures.of_tiles(weights, table, features[n]) for n, table in zip(finer, tables, strict=True)]
        while finer:
            name, *finer = finer
            read, *below = below
            level = self._level(name, *read.tiles(constant_share=self.as_published))
            yield level
            if finer:
                weights = self._select(level)
                below = [deeper.of_children(read.sums.shape[2]).mixed(weights) for deeper in below]

    def _level(self, name: str, tiles: Tensor, mask: Tensor, rows: Tensor) -> _Level:
        return _Level(name, self.embed[module_name(name)](tiles), mask, rows)

    def _pooled(self, level: _Level) -> Float[Tensor, "bag dim"]:
        part = module_name(level.name)
        seen = level.mask.any(dim=1)[:, None]
        scores = self.gated[part](level.hidden)
        # A bag whose selected tiles have no children adds nothing, where a softmax over nothing would not be a number.
        return self.pool[part](scores, level.hidden, level.mask | ~seen).squeeze(1) * seen

    def _select(self, level: _Level) -> Float[Tensor, "bag chosen place"]:
        """Return which places are selected, one row for each, in the order of the places."""
        scores = at_least_f32(self.selectors[module_name(level.name)](level.hidden).squeeze(1))
        attention = scores.masked_fill(~level.mask, torch.finfo(scores.dtype).min).softmax(dim=1) * level.mask
        count = min(self.selected, attention.shape[1])
        if not self.training:
            order = attention.masked_fill(~level.mask, -1).argsort(dim=1, descending=True, stable=True)
            return _one_hot(order[:, None, :count], level.mask).to(self.head.weight.dtype)
        noise = random_normal((len(attention), DRAWS, attention.shape[1]), attention)
        chosen = _PerturbedSelection.apply(attention, level.mask, noise, count, self.sigma, self.as_published)
        return chosen.to(self.head.weight.dtype)


def _check(levels: Sequence[str], selected: object, sigma: object) -> None:
    if len(levels) < 2:
        raise ConfigError(
            f"zoommil needs two or more magnifications, and the data offer {levels[0]}.", "Set data.magnifications."
        )
    for coarse, fine in itertools.pairwise(levels):
        side_ratio(coarse, fine)
    check_count("selected", selected)
    check_positive("sigma", sigma)


@dataclass(frozen=True)
class _Level:
    """What is read of one magnification.

    Attributes:
        name: The magnification.
        hidden: [bag, place, dim], embedded tiles, or mixtures of tiles.
        mask: [bag, place], true where there is one.
        rows: [bag, place], the tile, or the one with the largest weight; −1 where there is none.
    """

    name: str
    hidden: Float[Tensor, "bag place dim"]
    mask: Bool[Tensor, "bag place"]
    rows: Int[Tensor, "bag place"]


@dataclass(frozen=True)
class _Mixtures:
    """Weighted sums of the descendants, at one magnification, of the places of a coarser one.

    Attributes:
        sums: [bag, place, descendant, dim].
        share: [bag, place, descendant], sum of the weights: below 1 where some of the mixed tiles have no such
            descendant.
        rows: [bag, place, descendant], the tile with the largest weight.
    """

    sums: Float[Tensor, "bag place descendant dim"]
    share: Float[Tensor, "bag place descendant"]
    rows: Int[Tensor, "bag place descendant"]

    @classmethod
    def of_tiles(
        cls,
        weights: Float[Tensor, "bag chosen tile"],
        table: Int[Tensor, "bag tile descendant"],
        features: Float[Tensor, "bag finer dim"],
    ) -> _Mixtures:
        """Mix the descendants in `table` of the coarsest tiles, reading only those of tiles with a weight."""
        total = weights.detach().sum(dim=1)
        tile = total.topk(int((total > 0).sum(dim=1).max()), dim=1).indices
        some = weights.gather(2, tile[:, None].expand(-1, weights.shape[1], -1))
        rows = table.gather(1, tile[..., None].expand(-1, -1, table.shape[2]))
        bag = torch.arange(len(rows), device=rows.device)[:, None, None]
        real = (rows >= 0).to(some.dtype)
        return cls(features[bag, rows.clamp_min(0)] * real[..., None], real, rows).mixed(some)

    def mixed(self, weights: Float[Tensor, "bag chosen place"]) -> _Mixtures:
        """Mix the places by the weights of a selection."""
        heaviest = weights.argmax(dim=2)[..., None].expand(-1, -1, self.rows.shape[2])
        return _Mixtures(
            torch.einsum("bkp,bpcd->bkcd", weights, self.sums),
            torch.einsum("bkp,bpc->bkc", weights, self.share),
            self.rows.gather(1, heaviest),
        )

    def of_children(self, children: int) -> _Mixtures:
        """View the descendants of a place as those of its `children`."""

        def split(table: Tensor) -> Tensor:
            return table.unflatten(2, (children, -1)).flatten(1, 2)

        return _Mixtures(split(self.sums), split(self.share), split(self.rows))

    def tiles(self, constant_share: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the descendants as places of their magnification: means, mask and rows.

        Args:
            constant_share: Whether the sum of the weights counts as a constant going backward.
        """
        mask = self.share > 0
        share = self.share.detach() if constant_share else self.share
        means = self.sums / share.masked_fill(~mask, 1)[..., None]
        return means.flatten(1, 2), mask.flatten(1, 2), self.rows.masked_fill(~mask, -1).flatten(1, 2)


def _descendants(batch: BagBatch, levels: Sequence[str]) -> list[Int[Tensor, "bag tile _"]]:
    """Return, for each finer level, rows of the descendants of each coarsest tile, −1 where it has none."""
    tables = [children_of(batch, levels[0], levels[1])]
    for coarse, fine in itertools.pairwise(levels[1:]):
        below, rows = children_of(batch, coarse, fine), tables[-1]
        bag = torch.arange(len(rows), device=rows.device)[:, None, None]
        deeper = below[bag, rows.clamp_min(0)].masked_fill((rows < 0)[..., None], -1)
        tables.append(deeper.flatten(2, 3))
    return tables


def _one_hot(top: Int[Tensor, "bag draw chosen"], mask: Bool[Tensor, "bag place"]) -> Tensor:
    """Return [bag, chosen, place], the share of the draws in which a place was chosen at each rank by row."""
    rank = _ranked(top, mask).transpose(1, 2)
    weights = torch.zeros(*rank.shape[:2], mask.shape[1] + 1, dtype=torch.float64, device=mask.device)
    return weights.scatter_add_(2, rank, weights.new_tensor(1 / top.shape[1]).expand(rank.shape))[..., :-1]


def _ranked(top: Tensor, mask: Tensor) -> Int[Tensor, "bag draw chosen"]:
    """Sort the chosen places of each draw; those in the padding come last, as one beyond the places."""
    real = mask[:, None].expand(-1, top.shape[1], -1).gather(2, top)
    return top.masked_fill(~real, mask.shape[1]).sort(dim=2).values


class _PerturbedSelection(torch.autograd.Function):
    """Mean over draws of the k largest of attention plus noise, in the order of the places (Cordonnier et al., eq. 4).

    Its gradient is the mean over draws of the selection times the noise, divided by sigma (eq. 5).
    """

    @staticmethod
    def forward(
        ctx: Any, attention: Tensor, mask: Tensor, noise: Tensor, count: int, sigma: float, diagonal: bool
    ) -> Tensor:
        noisy = (attention[:, None] + sigma * noise).masked_fill(~mask[:, None], -torch.inf)
        top = noisy.topk(count, dim=2).indices
        ctx.save_for_backward(_ranked(top, mask), noise)
        ctx.sigma, ctx.diagonal = sigma, diagonal
        return _one_hot(top, mask).to(attention.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rank, noise = ctx.saved_tensors
        rank = rank.transpose(1, 2)
        # [bag, chosen, draw]: the gradient where that draw selected; none where it selected padding.
        pushed = torch.nn.functional.pad(gradient, (0, 1)).gather(2, rank)
        if ctx.diagonal:
            own = torch.nn.functional.pad(noise, (0, 1)).transpose(1, 2).gather(1, rank)
            places = gradient.new_zeros(len(gradient), gradient.shape[2] + 1)
            of_attention = places.scatter_add_(1, rank.flatten(1), (pushed * own).flatten(1))[:, :-1]
        else:
            of_attention = torch.einsum("bd,bdp->bp", pushed.sum(dim=1), noise)
        return of_attention / (noise.shape[1] * ctx.sigma), None, None, None, None, None
