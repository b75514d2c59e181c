"""Scaled dot-product attention over tiles."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.dropped_attention import DroppedAttention


def attend(
    query: Float[Tensor, "bag head query dim"],
    key: Float[Tensor, "bag head key dim"],
    value: Float[Tensor, "bag head key dim"],
    mask: Bool[Tensor, "bag key"] | None,
    dropout: float = 0.0,
) -> Float[Tensor, "bag head query dim"]:
    """Softmax(QKᵀ/√dim)·V over the real keys.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask: True where a key is real; None where every key is.
        dropout: Share of the attention weights set to zero, the others scaled up.
    """
    if dropout and query.device.type == "cpu":
        bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        return DroppedAttention.apply(query, key, value, bias, dropout)
    where = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=where, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Multi-head self-attention, query, key and value by one linear map.

    Args:
        dim: Width of the tokens.
        heads: Attention heads; must divide `dim`.
        dropout: Of the attention weights, in training alone.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, tokens: Float[Tensor, "bag token dim"], mask: Bool[Tensor, "bag token"] | None
    ) -> Float[Tensor, "bag token dim"]:
        """What each token found among the real tokens."""
        heads = self.query_key_value(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        found = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(found.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of source tokens over context tokens, one learned vector added to both.

    Args:
        dim: Width of the tokens.
        heads: Attention heads; must divide `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        source: Float[Tensor, "bag query dim"],
        context: Float[Tensor, "bag key dim"],
        mask: Bool[Tensor, "bag key"] | None,
    ) -> Float[Tensor, "bag query dim"]:
        """What each source token found among the real context tokens."""
        query = self.query(source + self.scale_embedding).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key_value = self.key_value(context + self.scale_embedding)
        key, value = key_value.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(attend(query, key, value, mask).transpose(1, 2).flatten(2))
