"""PANTHER: a slide as a Gaussian mixture around prototypes that all slides share.

Sources: Song et al., "Morphological Prototyping for Unsupervised Slide Representation Learning in Computational
Pathology", CVPR 2024 (github.com/mahmoodlab/PANTHER, commit 15531d32); Kim, "Differentiable
Expectation-Maximization for Set Representation Learning", ICLR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.bag import Prepared, check_choice, check_count, check_positive
from cfusion.models.baselines import FinestBagModel
from cfusion.models.clusters import shared_centres
from cfusion.types import BagBatch, SurvivalOutput, at_least_f32

FEATURES = ("all", "means")


@dataclass(frozen=True)
class Mixture:
    """Gaussian mixtures with diagonal covariances, one of each bag.

    Attributes:
        weights: Sum to 1.
        means: Of the components.
        variances: Per channel.
    """

    weights: Float[Tensor, "bag component"]
    means: Float[Tensor, "bag component dim"]
    variances: Float[Tensor, "bag component dim"]

    def log_joint(self, tiles: Float[Tensor, "bag tile dim"]) -> Float[Tensor, "bag tile component"]:
        """Compute log weight + log density of each tile under each component."""
        precision = 1 / self.variances
        squares = tiles.square() @ precision.mT - 2 * tiles @ (self.means * precision).mT
        own = self.means.square() * precision + self.variances.log()
        constant = own.sum(dim=2) + tiles.shape[2] * math.log(2 * math.pi)
        return self.weights.log()[:, None] - (squares + constant[:, None]) / 2


class PANTHER(FinestBagModel, Prepared):
    """Mixture weights, means and variances of a bag, and a linear layer without bias.

    `prepare` fits the prototypes on the training bags. The mixture starts at the prototypes with equal weights and is
    fitted to a bag by maximum a posteriori expectation-maximization. Only the linear layer is trained. A bag with fewer
    tiles than prototypes has a mixture too: components without tiles stay at their prototypes.

    `iterations`, `prior_tiles` and `prior_variance` are the values that the published program computes with; its
    scripts pass others, which do not arrive.

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard.
        magnifications: Those the data offer.
        prototypes: Number of components.
        features: `all`: weights, means and variances, as published; `means`: only the means.
        iterations: Steps of expectation-maximization.
        prior_tiles: Number of tiles that a prototype counts for in its component (τ in the program).
        prior_variance: Variance of each channel before the fit (ε in the program).
    """

    prototype_means: Tensor
    prototype_variances: Tensor

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        magnifications: Sequence[float],
        prototypes: int = 16,
        features: str = "all",
        iterations: int = 1,
        prior_tiles: float = 0.001,
        prior_variance: float = 0.1,
    ) -> None:
        super().__init__(backbone_dim, magnifications)
        for option, value in {"prototypes": prototypes, "iterations": iterations}.items():
            check_count(option, value)
        for option, number in {"prior_tiles": prior_tiles, "prior_variance": prior_variance}.items():
            check_positive(option, number)
        check_choice("features", features, FEATURES)
        self.features, self.iterations, self.prior_tiles = features, iterations, prior_tiles
        self.register_buffer("prototype_means", 0.1 * torch.randn(prototypes, backbone_dim))
        self.register_buffer("prototype_variances", torch.full((prototypes, backbone_dim), prior_variance))
        width = prototypes * (1 + 2 * backbone_dim if features == "all" else backbone_dim)
        self.head = nn.Linear(width, n_bins, bias=False)

    def prepare(self, bags: Iterable[BagBatch], count: int, *, edges_months: Sequence[float], seed: int) -> None:
        """Fit the prototypes by k-means on an equal number of tiles of each training bag.

        Raises:
            DataError: The training bags have fewer different tiles than there are prototypes.
        """
        (name,) = self.magnification_names
        wanted = len(self.prototype_means)
        self.prototype_means.copy_(shared_centres(bags, count, name, wanted, option="prototypes", seed=seed))

    def mixture(self, tiles: Float[Tensor, "bag tile dim"], mask: Bool[Tensor, "bag tile"] | None) -> Mixture:
        """Fit the mixture of each bag."""
        means, variances = (b.expand(len(tiles), -1, -1) for b in (self.prototype_means, self.prototype_variances))
        fitted = Mixture(means.new_full(means.shape[:2], 1 / means.shape[1]), means, variances)
        for _ in range(self.iterations):
            shares = F.softmax(fitted.log_joint(tiles), dim=2)
            if mask is not None:
                shares = shares * mask[..., None]
            tau = self.prior_tiles
            sizes = shares.sum(dim=1) + tau
            first = (shares.mT @ tiles + tau * means) / sizes[..., None]
            second = (shares.mT @ tiles.square() + tau * (variances + means.square())) / sizes[..., None]
            fitted = Mixture(sizes / sizes.sum(dim=1, keepdim=True), first, second - first.square())
        return fitted

    def survival_of(self, tiles: Tensor, mask: Tensor | None) -> SurvivalOutput:
        """See `FinestBagModel`."""
        # Variances are differences of squares, for which 16 bits are too few.
        with torch.autocast(tiles.device.type, enabled=False):
            tiles = at_least_f32(tiles)
            if mask is not None:
                tiles = tiles.masked_fill(~mask[..., None], 0)
            found = self.mixture(tiles, mask)
            parts = [found.weights, found.means, found.variances] if self.features == "all" else [found.means]
            embedding = torch.cat([part.flatten(1) for part in parts], dim=1)
            return SurvivalOutput.from_logits(self.head(embedding))
