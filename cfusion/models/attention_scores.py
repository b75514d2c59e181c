"""Attention scores of tiles from a small network, gated or not (Ilse et al., ICML 2018, eqs. 8 and 9)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from cfusion.models.dropout import Dropout
from cfusion.models.linear import Linear


class AttentionScores(nn.Module):
    """Linear map of tanh(Vh), or of tanh(Vh) · sigmoid(Uh) if gated.

    Args:
        dim: Width of the tiles.
        width: Width of the hidden layer.
        rows: Number of scores of each tile.
        gated: Whether the hidden layer is gated.
        dropout: Of the hidden layer and of the gate.
    """

    def __init__(self, dim: int, width: int, *, rows: int = 1, gated: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.content = Linear(dim, width)
        self.gate = Linear(dim, width) if gated else None
        self.score = nn.Linear(width, rows)
        self.dropout = Dropout(dropout)

    def forward(self, tiles: Float[Tensor, "bag tile dim"]) -> Float[Tensor, "bag row tile"]:
        """Compute the scores of each tile."""
        hidden = self.dropout(self.content(tiles).tanh())
        if self.gate is not None:
            hidden = hidden * self.dropout(self.gate(tiles).sigmoid())
        return self.score(hidden).transpose(1, 2)
