"""The baselines of the study. All read only the finest magnification, and keep PyTorch's initial weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cfusion.models.attention import AttentionPooling
from cfusion.models.bag import BagModel, TileView, check_magnifications
from cfusion.models.linear import Linear
from cfusion.models.segments import Real, Segments
from cfusion.types import BagBatch, SurvivalOutput


class FinestBagModel(BagModel):
    """A model that reads the finest of the offered magnifications.

    Attributes:
        summaries: Number of attention queries that summarise the complete bag.
    """

    summaries = 1

    def __init__(self, backbone_dim: int, magnifications: Sequence[float]) -> None:
        check_magnifications(magnifications)
        super().__init__([max(magnifications)], magnifications, backbone_dim)

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        (name,) = self.magnification_names
        return self.survival_of(features[name], None if batch.masks is None else batch.masks[name])

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """See `BagModel`."""
        return TileView(self.magnification_names[0], self.summaries)

    def survival_of(
        self, tiles: Float[Tensor, "bag tile dim"], mask: Bool[Tensor, "bag tile"] | None
    ) -> SurvivalOutput:
        """Compute the output for one magnification; `mask` is true where a tile is real."""
        raise NotImplementedError


class PackingBagModel(FinestBagModel):
    """One that also takes bags that are joined without padding."""

    packs: ClassVar[bool] = True

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        if batch.lengths is None:
            return super().survival(features, batch)
        (name,) = self.magnification_names
        return self.survival_of(features[name], Segments(batch.lengths[name]))

    def survival_of(self, tiles: Float[Tensor, "bag tile dim"], mask: Real) -> SurvivalOutput:
        """See `FinestBagModel`; the mask may also be the bags of a joined row."""
        raise NotImplementedError


class MeanMIL(PackingBagModel):
    """Linear, ReLU, mean over tiles, linear: a lower bound for any attention model.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the hidden layer.
        magnifications: Magnifications that the data offer.
    """

    def __init__(self, *, backbone_dim: int, n_bins: int, embed_dim: int, magnifications: Sequence[float]) -> None:
        super().__init__(backbone_dim, magnifications)
        self.embed = nn.Sequential(Linear(backbone_dim, embed_dim), nn.ReLU())
        self.head = nn.Linear(embed_dim, n_bins)

    def survival_of(self, tiles: Tensor, mask: Real) -> SurvivalOutput:
        """See `FinestBagModel`."""
        hidden = self.embed(tiles)
        if isinstance(mask, Segments):
            return SurvivalOutput.from_logits(self.head(torch.cat([own.mean(dim=1) for own in mask.split(hidden)])))
        if mask is None:
            return SurvivalOutput.from_logits(self.head(hidden.mean(dim=1)))
        total = (hidden * mask[..., None]).sum(dim=1)
        return SurvivalOutput.from_logits(self.head(total / mask.sum(dim=1, keepdim=True)))


class AMIL(PackingBagModel):
    """Gated attention MIL (Ilse et al., ICML 2018, eq. 9).

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the hidden layer; the attention has half of it.
        magnifications: Those the data offer.
    """

    def __init__(self, *, backbone_dim: int, n_bins: int, embed_dim: int, magnifications: Sequence[float]) -> None:
        super().__init__(backbone_dim, magnifications)
        self.embed = nn.Sequential(Linear(backbone_dim, embed_dim), nn.ReLU())
        self.gate = Linear(embed_dim, 2 * (embed_dim // 2))
        self.score = nn.Linear(embed_dim // 2, 1)
        self.pool = AttentionPooling()
        self.head = nn.Linear(embed_dim, n_bins)

    def survival_of(self, tiles: Tensor, mask: Real) -> SurvivalOutput:
        """See `FinestBagModel`."""
        hidden = self.embed(tiles)
        content, gate = self.gate(hidden).chunk(2, dim=2)
        scores = self.score(content.tanh() * gate.sigmoid()).transpose(1, 2)
        return SurvivalOutput.from_logits(self.head(self.pool(scores, hidden, mask).squeeze(1)))


class DSMIL(PackingBagModel):
    """Dual-stream MIL (Li et al., CVPR 2021) as the study adapted it.

    The instance stream selects each bin's critical tile, against which the tiles are weighed. It learns by a separate
    loss (DSMIL, eq. 5): the output carries the critical tiles' logits. The published program gave it no gradient,
    which is random pooling; `published` freezes it, to the same effect.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        magnifications: Magnifications that the data offer.
        published: Keep the initial weights of the instance stream.
    """

    def __init__(self, *, backbone_dim: int, n_bins: int, magnifications: Sequence[float], published: bool) -> None:
        super().__init__(backbone_dim, magnifications)
        self.published = published
        self.summaries = n_bins
        self.instance = nn.Linear(backbone_dim, n_bins).requires_grad_(not published)
        self.query = nn.Sequential(Linear(backbone_dim, 128), nn.ReLU(), Linear(128, 128), nn.Tanh())
        self.pool = AttentionPooling()
        self.head = nn.Conv1d(n_bins, n_bins, kernel_size=backbone_dim)

    def survival_of(self, tiles: Tensor, mask: Real) -> SurvivalOutput:
        """See `FinestBagModel`."""
        instance, query = self.instance(tiles), self.query(tiles)
        if isinstance(mask, Segments):
            parts = zip(mask.split(instance), mask.split(query), strict=True)
            found = [_critical(*part) for part in parts]
            top, scores = torch.cat([top for top, _ in found]), torch.cat([scores for _, scores in found], dim=2)
        else:
            if mask is not None:
                instance = instance.masked_fill(~mask[..., None], torch.finfo(instance.dtype).min)
            top, scores = _critical(instance, query)
        output = SurvivalOutput.from_logits(self.head(self.pool(scores, tiles, mask)).squeeze(2))
        return output if self.published else dataclasses.replace(output, instance_logits=top)


def _critical(
    instance: Float[Tensor, "bag tile bin"], query: Float[Tensor, "bag tile width"]
) -> tuple[Float[Tensor, "bag bin"], Float[Tensor, "bag bin tile"]]:
    """Return the logit of each bin's critical tile, and every tile's similarity to it."""
    top, critical = instance.max(dim=1)
    critical_query = query.gather(1, critical[..., None].expand(-1, -1, query.shape[2]))
    return top, critical_query @ query.transpose(1, 2) / query.shape[2] ** 0.5
