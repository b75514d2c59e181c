"""Attention with dropout of its weights, a few queries at a time: no N×N tensor is ever there.

The backward pass computes the weights and their dropout mask again. On a CPU this takes less than half of the time of
PyTorch's attention with dropout, which materialises the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cfusion.models.dropout import clear_dropped, keep_mask, random_keys

CHUNK_ELEMENTS = 1 << 20
"""Attention weights computed at a time: they stay in the processor's cache."""

SMALLEST_CHUNK = 32
"""Queries computed at a time at least, below which matrix products are slow."""


class DroppedAttention(torch.autograd.Function):
    """Softmax(QKᵀ/√dim)·V with dropout of the weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        """As `attend`; `bias` [bag, key] is added to the scores."""
        bags, heads, queries, dim = query.shape
        row_key = random_keys((bags * heads, queries, 1), query.device)
        column_key = random_keys((bags * heads, 1, key.shape[2]), query.device)
        q, k, v = ((t.flatten(0, 1)).contiguous() for t in (query * dim**-0.5, key, value))
        rows_of_bias = None if bias is None else bias.repeat_interleave(heads, dim=0)[:, None]
        out = query.new_empty(bags, queries, heads, dim)
        for rows in query_chunks(queries, key.shape[2], bags * heads):
            weights = attention_weights(q[:, rows], k, rows_of_bias)
            kept = clear_dropped(weights, keep_mask(row_key[:, rows], column_key, dropout, weights.dtype))
            part = torch.bmm(kept, v).mul_(1 / (1 - dropout))
            out[:, rows] = part.unflatten(0, (bags, heads)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, rows_of_bias, row_key, column_key, out)
        ctx.dropout = dropout
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        q, k, v, rows_of_bias, row_key, column_key, out = ctx.saved_tensors
        bags, heads = grad.shape[:2]
        # With the upscaling moved into the incoming gradient, the mask only ever clears.
        grad_out = (grad.flatten(0, 1) * (1 / (1 - ctx.dropout))).contiguous()
        delta = (grad * out.transpose(1, 2)).sum(dim=3, keepdim=True).flatten(0, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows in query_chunks(q.shape[1], k.shape[1], bags * heads):
            weights = attention_weights(q[:, rows], k, rows_of_bias)
            mask = keep_mask(row_key[:, rows], column_key, ctx.dropout, weights.dtype)
            grad_rows = grad_out[:, rows]
            grad_scores = clear_dropped(torch.bmm(grad_rows, v.transpose(1, 2)), mask)
            grad_scores.sub_(delta[:, rows]).mul_(weights)
            grad_v.baddbmm_(clear_dropped(weights, mask).transpose(1, 2), grad_rows)
            grad_q[:, rows] = torch.bmm(grad_scores, k)
            grad_k.baddbmm_(grad_scores.transpose(1, 2), q[:, rows])
        grad_q.mul_(q.shape[2] ** -0.5)
        return *(t.unflatten(0, (bags, heads)) for t in (grad_q, grad_k, grad_v)), None, None


def query_chunks(queries: int, keys: int, matrices: int) -> list[slice]:
    """Ranges of queries whose weights over all keys fit the cache."""
    size = max(SMALLEST_CHUNK, CHUNK_ELEMENTS // (keys * matrices))
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax over the keys of scaled queries times keys, plus `bias` where a key is to be left out."""
    scores = query @ key.transpose(-2, -1)
    return F.softmax(scores if bias is None else scores.add_(bias), dim=-1)
