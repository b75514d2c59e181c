"""Scaled dot-product attention over tiles, and access to its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.chunked_attention import ChunkedAttention, attention_weights, query_chunks
from cfusion.models.linear import Linear, by_onednn, linear
from cfusion.models.segments import Pairs, Real, Segments, first_of_each

_VARLEN_TYPES = (torch.float16, torch.bfloat16)
"""Types for which PyTorch has attention over bags of different length; it has none with dropout, and none on a CPU."""

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


@functools.cache
def _varlen_attention() -> Callable[..., object] | None:
    """Return PyTorch's attention over bags of different length; it is imported with the compiler, which takes 2 s."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn


def attend_within(
    query: Float[Tensor, "1 head query dim"],
    key: Float[Tensor, "1 head key dim"],
    value: Float[Tensor, "1 head key dim"],
    pairs: Pairs,
    dropout: float = 0.0,
    visit: Visit | None = None,
) -> Float[Tensor, "1 head query dim"]:
    """Compute `attend` of each bag of a joined row: in one call where PyTorch has one, else bag by bag."""
    plain = visit is None and not dropout
    if (
        plain
        and query.device.type == "cuda"
        and query.dtype in _VARLEN_TYPES
        and (varlen_attention := _varlen_attention())
    ):
        rows = [part[0].transpose(0, 1) for part in (query, key, value)]
        sides = pairs.queries, pairs.keys
        edges, most = [side.edges(query.device) for side in sides], [max(side.lengths) for side in sides]
        found = cast(Tensor, varlen_attention(rows[0], rows[1], rows[2], edges[0], edges[1], most[0], most[1]))
        return found.transpose(0, 1)[None]
    parts = zip(pairs.queries.split(query, 2), pairs.keys.split(key, 2), pairs.keys.split(value, 2), strict=True)
    return torch.cat([attend(*part, None, dropout, visit) for part in parts], dim=2)


class QueryKeyValue(nn.Linear):
    """Query, key and value of each token, by one linear map.

    Args:
        dim: Width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim)

    def forward(  # type: ignore[override]
        self, tokens: Float[Tensor, "bag token dim"], queries: int | None = None, real: Real = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute query, key and value, each [bag, token, dim]; queries only of each bag's first `queries` tokens."""
        if queries is None:
            query, key, value = linear(tokens, self.weight, self.bias).chunk(3, dim=2)
            return query, key, value
        (query_weight, rest), (query_bias, rest_bias) = (
            part.split([self.in_features, 2 * self.in_features]) for part in (self.weight, self.bias)
        )
        key, value = linear(tokens, rest, rest_bias).chunk(2, dim=2)
        return linear(first_of_each(tokens, real, queries), query_weight, query_bias), key, value


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
        self, tokens: Float[Tensor, "bag token dim"], real: Real, queries: int | None = None
    ) -> Float[Tensor, "bag query dim"]:
        """Attend from each token, or each of a bag's first `queries`, to the bag's own tokens."""
        parts = self.query_key_value(tokens, queries, real)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        if isinstance(real, Segments):
            asking = real if queries is None else Segments(tuple(min(queries, n) for n in real.lengths))
            found = attend_within(query, key, value, Pairs(asking, real), dropout, self.visit)
        else:
            found = attend(query, key, value, real, dropout, self.visit)
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
        real: Bool[Tensor, "bag key"] | Pairs | None,
    ) -> Float[Tensor, "bag query dim"]:
        """Attend from each source token to the context tokens of its bag."""
        query = self.query(source + self.scale_embedding).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key_value = self.key_value(context + self.scale_embedding)
        key, value = key_value.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if isinstance(real, Pairs):
            found = attend_within(query, key, value, real, visit=self.visit)
        else:
            found = attend(query, key, value, real, visit=self.visit)
        return self.out(found.transpose(1, 2).flatten(2))


class AttentionPooling(Attention):
    """Weighted sums of tiles; the weights are a softmax of given scores over the real tiles."""

    def forward(
        self,
        scores: Float[Tensor, "bag row tile"],
        tiles: Float[Tensor, "bag tile dim"],
        real: Real,
    ) -> Float[Tensor, "pooled row dim"]:
        """Compute one sum of each bag for each row of scores."""
        if isinstance(real, Segments):
            parts = zip(real.split(scores, 2), real.split(tiles), strict=True)
            return torch.cat([self(own_scores, own, None) for own_scores, own in parts])
        if real is not None:
            scores = scores.masked_fill(~real[:, None, :], -torch.inf)
        weights = F.softmax(scores, dim=2)
        if self.visit is not None:
            self.visit(slice(0, weights.shape[1]), weights[:, None])
        return weights @ tiles
