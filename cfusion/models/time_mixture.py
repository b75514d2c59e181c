"""A survival curve as a mixture of normal distributions of transformed time, read off at the edges of the time bins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.dropout import Dropout
from cfusion.models.linear import Linear

PUBLISHED_SLACK = 1e-6
LONGEST_MONTHS = 200.0
"""Where the means of the components start and end, as published."""

_SMALLEST = 1e-12
"""Of a bin's cumulative hazard: a bin without any has no logit."""


@dataclass(frozen=True)
class TimeMixture:
    """Distributions of log(exp(t) − 1), where t is the time in months.

    Attributes:
        log_weights: Logs of weights that sum to 1: a weight may be too small for its type, its log is not.
        means: Shared by all bags.
        deviations: Standard deviations, shared by all bags.
        slack: Added to exp(t) − 1.
    """

    log_weights: Float[Tensor, "bag component"]
    means: Float[Tensor, " component"]
    deviations: Float[Tensor, " component"]
    slack: float = 0.0

    @property
    def weights(self) -> Float[Tensor, "bag component"]:
        """The share of each component."""
        return self.log_weights.exp()

    def log_survival(self, months: Float[Tensor, " time"]) -> Float[Tensor, "bag time"]:
        """Compute the log of the probability of surviving beyond each time, which must be above 0."""
        # exp(t) exceeds the range of f32 at 89 months.
        place = months + torch.log1p((self.slack - 1) * (-months).exp())
        beyond = torch.special.log_ndtr((self.means[:, None] - place) / self.deviations[:, None])
        return torch.logsumexp(self.log_weights[..., None] + beyond, dim=1)

    def logits(self, edges_months: Float[Tensor, " edge"]) -> Float[Tensor, "bag bin"]:
        """Compute the logits of the hazards of the bins between the edges; the first edge is 0."""
        log_survival = F.pad(self.log_survival(edges_months[1:]), (1, 0))
        hazard = (log_survival[:, :-1] - log_survival[:, 1:]).clamp_min(_SMALLEST)
        return hazard + torch.log(-torch.expm1(-hazard))


class TimeMixtureHead(nn.Module):
    """Two hidden layers give the weights of the components; means and deviations do not depend on the bag.

    Args:
        dim: Width of the bag's features.
        width: Width of the hidden layers.
        components: Number of components.
        dropout: After each hidden layer.
        slack: See `TimeMixture`.
    """

    def __init__(self, dim: int, width: int, components: int, dropout: float, slack: float = 0.0) -> None:
        super().__init__()
        self.slack = slack
        self.hidden = nn.Sequential(
            Linear(dim, width), nn.GELU(), Dropout(dropout), Linear(width, width), nn.GELU(), Dropout(dropout)
        )  # fmt: skip
        self.weight = nn.Linear(width, components)
        self.mean = nn.Parameter(torch.linspace(0, LONGEST_MONTHS, components))
        self.deviation = nn.Parameter(torch.ones(components))
        self.mean_map = nn.Linear(components, components)
        self.deviation_map = nn.Linear(components, components)

    def forward(self, features: Float[Tensor, "bag dim"]) -> TimeMixture:
        """Compute the distribution of each bag."""
        log_weights = F.log_softmax(self.weight(self.hidden(features)), dim=1)
        means = self.mean_map(self.mean).clamp(-LONGEST_MONTHS, LONGEST_MONTHS)
        deviations = F.softplus(self.deviation_map(self.deviation)).clamp(1e-2, 1e2)
        return TimeMixture(log_weights, means, deviations, self.slack)
