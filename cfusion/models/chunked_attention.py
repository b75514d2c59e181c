"""Attention with dropout of its weights, a few queries at a time: it never creates an N×N tensor.

The backward pass computes the weights and their dropout mask again. On a CPU this takes less than half of the time
of
PyTorch's attention with dropout, which materialises the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cfusion.models.dropout import clear_dropped, keep_mask, random_keys
from cfusion.models.linear import product

CHUNK_ELEMENTS = 1 << 20
"""Attention weights computed at a time: they stay in the processor's cache."""

SMALLEST_CHUNK = 128
"""Minimum number of queries computed at a time; below it matrix products are slow."""


class ChunkedAttention(torch.autograd.Function):
    """Compute softmax(QKᵀ/√dim)·V with dropout of the weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        """Attend as `attend` does; `bias` [bag, key] is added to the scores."""
        bags, heads, queries, dim = query.shape
        keys = [random_keys((bags * heads, *s), query.device) for s in ((queries, 1), (1, key.shape[2])) if dropout]
        q, k, v = (t.flatten(0, 1).contiguous() for t in (query * dim**-0.5, key, value))
        out = query.new_empty(bags, queries, heads, dim).transpose(1, 2)
        for matrix, rows in _parts(q, k):
            weights = attention_weights(q[matrix, rows], k[matrix], None if bias is None else bias[matrix // heads])
            if dropout:
                clear_dropped(weights, _mask(keys, matrix, rows, dropout, weights.dtype))
            out[*divmod(matrix, heads), rows] = product(weights, v[matrix]).mul_(1 / (1 - dropout))
        ctx.save_for_backward(q, k, v, bias, out, *keys)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of query, key and value."""
        q, k, v, bias, out, *keys = ctx.saved_tensors
        bags, heads = grad.shape[:2]
        # With the upscaling moved into the incoming gradient, the mask only clears entries.
        grad_out = (grad * (1 / (1 - ctx.dropout))).flatten(0, 1).contiguous()
        delta = (grad * out).sum(dim=3, keepdim=True).flatten(0, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for matrix, rows in _parts(q, k):
            at = matrix, rows
            weights = attention_weights(q[at], k[matrix], None if bias is None else bias[matrix // heads])
            grad_scores = product(grad_out[at], v[matrix].T)
            if ctx.dropout:
                mask = _mask(keys, matrix, rows, ctx.dropout, weights.dtype)
                clear_dropped(grad_scores, mask)
            grad_scores.sub_(delta[at]).mul_(weights)
            if ctx.dropout:
                clear_dropped(weights, mask)
            grad_v[matrix] += product(weights.T, grad_out[at])
            grad_q[at] = product(grad_scores, k[matrix])
            grad_k[matrix] += product(grad_scores.T, q[at])
        grad_q.mul_(q.shape[2] ** -0.5)
        return *(t.unflatten(0, (bags, heads)) for t in (grad_q, grad_k, grad_v)), None, None


def _parts(query: Tensor, key: Tensor) -> list[tuple[int, slice]]:
    """A bag's head and the queries of it that are computed at a time."""
    return [(matrix, rows) for matrix in range(len(query)) for rows in query_chunks(query.shape[1], key.shape[1], 1)]


def _mask(keys: list[Tensor], matrix: int, rows: slice, dropout: float, dtype: torch.dtype) -> Tensor:
    row_key, column_key = keys
    return keep_mask(row_key[matrix, rows], column_key[matrix], dropout, dtype)


def query_chunks(queries: int, keys: int, matrices: int) -> list[slice]:
    """Yield ranges of queries whose weights over all keys fit the cache."""
    size = max(SMALLEST_CHUNK, CHUNK_ELEMENTS // (keys * matrices))
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the softmax over the keys of scaled queries times keys, plus `bias` where a key is left out."""
    scores = product(query, key.T) if query.dim() == 2 else query @ key.transpose(-2, -1)
    return F.softmax(scores if bias is None else scores.add_(bias), dim=-1)
