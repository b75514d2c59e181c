"""Gated attention scores, by which most models pool their tiles."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from cfusion.models.dropout import Dropout
from cfusion.models.linear import Linear


class GatedScore(nn.Module):
    """A score for each tile: a linear map of tanh(Vh) ⊙ sigmoid(Uh) (Ilse et al., ICML 2018, eq. 9).

    Args:
        dim: Width of the tiles.
        hidden: Width of V and U.
        dropout: After the tanh and after the sigmoid.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = Linear(dim, 2 * hidden)
        self.dropout = Dropout(dropout)
        self.score = nn.Linear(hidden, 1)

    def forward(self, tiles: Float[Tensor, "bag tile dim"]) -> Float[Tensor, "bag 1 tile"]:
        """Return one row of scores for each bag, as `AttentionPooling` takes it."""
        content, gate = self.gate(tiles).chunk(2, dim=2)
        return self.score(self.dropout(content.tanh()) * self.dropout(gate.sigmoid())).transpose(1, 2)
