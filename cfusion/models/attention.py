"""Scaled dot-product attention over tiles, and access to its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.chunked_attention import ChunkedAttention, attention_weights, query_chunks
from cfusion.models.linear import Linear, by_onednn, linear

Visit = Callable[[slice, Tensor], None]
"""Called with a range of queries and their weights [bag, head, query, key]."""


class Attention(nn.Module):
    """Anything that weighs tiles.

    Attributes:
        visit: If set, receives the weights of every forward pass, a few queries at a time: exactly the weights that the
            output is computed from.
    """

    visit: Visit | None = None


def attend(
    query: Float[Tensor, "bag head query dim"],
    key: Float[Tensor, "bag head key dim"],
    value: Float[Tensor, "bag head key dim"],
    mask: Bool[Tensor, "bag key"] | None,
    dropout: float = 0.0,
    visit: Visit | None = None,
) -> Float[Tensor, "bag head query dim"]:
    """Compute softmax(QKᵀ/√dim)·V over the real keys, without an N×N tensor.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask: True where a key is real; None if every key is.
        dropout: Share of the attention weights set to zero; the others are scaled up.
        visit: Receives the weights; dropout must then be 0.
    """
    multiplications = query[0, 0].numel() * key.shape[2]
    chunked = query.device.type == "cpu" and (dropout > 0 or by_onednn(query, key, multiplications))
    if visit is None and not chunked:
        where = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=where, dropout_p=dropout)
    bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    if visit is None:
        return ChunkedAttention.apply(query, key, value, bias, dropout)
    out = []
    for rows in query_chunks(query.shape[2], key.shape[2], query.shape[0] * query.shape[1]):
        scaled = query[:, :, rows] * query.shape[3] ** -0.5
        weights = attention_weights(scaled, key, None if bias is None else bias[:, None, None])
        visit(rows, weights)
        out.append(weights @ value)
    return torch.cat(out, dim=2)


class QueryKeyValue(nn.Linear):
    """Query, key and value of each token, by one linear map.

    Args:
        dim: Width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim)

    def forward(  # type: ignore[override]
        self, tokens: Float[Tensor, "bag token dim"], queries: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute query, key and value, each [bag, token, dim]; queries only of the first `queries` tokens."""
        if queries is None:
            query, key, value = linear(tokens, self.weight, self.bias).chunk(3, dim=2)
            return query, key, value
        (query_weight, rest), (query_bias, rest_bias) = (
            part.split([self.in_features, 2 * self.in_features]) for part in (self.weight, self.bias)
        )
        key, value = linear(tokens, rest, rest_bias).chunk(2, dim=2)
        return linear(tokens[:, :queries], query_weight, query_bias), key, value


class SelfAttention(Attention):
    """Multi-head self-attention.

    Args:
        dim: Width of the tokens.
        heads: Attention heads; must divide `dim`.
        dropout: Of the attention weights, only in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = QueryKeyValue(dim)
        self.out = Linear(dim, dim)

    def forward(
        self, tokens: Float[Tensor, "bag token dim"], mask: Bool[Tensor, "bag token"] | None, queries: int | None = None
    ) -> Float[Tensor, "bag query dim"]:
        """Attend from each token, or each of the first `queries`, to the real tokens."""
        parts = self.query_key_value(tokens, queries)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        found = attend(query, key, value, mask, self.dropout if self.training else 0.0, self.visit)
        return self.out(found.transpose(1, 2).flatten(2))


def keep_attention_dropout(model: nn.Module) -> None:
    """Leave dropout of self-attention on in a model that was set to evaluate, until its mode is next set."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.training = True


class CrossAttention(Attention):
    """Multi-head attention of source tokens over context tokens, one learned vector added to both.

    Args:
        dim: Width of the tokens.
        heads: Attention heads; must divide `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        self.query = Linear(dim, dim)
        self.key_value = Linear(dim, 2 * dim)
        self.out = Linear(dim, dim)

    def forward(
        self,
        source: Float[Tensor, "bag query dim"],
        context: Float[Tensor, "bag key dim"],
        mask: Bool[Tensor, "bag key"] | None,
    ) -> Float[Tensor, "bag query dim"]:
        """Attend from each source token to the real context tokens."""
        query = self.query(source + self.scale_embedding).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key_value = self.key_value(context + self.scale_embedding)
        key, value = key_value.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        found = attend(query, key, value, mask, visit=self.visit)
        return self.out(found.transpose(1, 2).flatten(2))


class AttentionPooling(Attention):
    """Weighted sums of tiles; the weights are a softmax of given scores over the real tiles."""

    def forward(
        self,
        scores: Float[Tensor, "bag row tile"],
        tiles: Float[Tensor, "bag tile dim"],
        mask: Bool[Tensor, "bag tile"] | None,
    ) -> Float[Tensor, "bag row dim"]:
        """Compute one sum for each row of scores; `mask` is true where a tile is real."""
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
        weights = F.softmax(scores, dim=2)
        if self.visit is not None:
            self.visit(slice(0, weights.shape[1]), weights[:, None])
        return weights @ tiles
