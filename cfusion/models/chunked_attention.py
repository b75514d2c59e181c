"""Attention with dropout of its weights, a few queries at a time: it never creates an N×N tensor.

The backward pass computes the weights and their dropout mask again, unless they are few. On a CPU this takes less than
half of the time of PyTorch's attention with dropout, which materialises the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cfusion.models.dropout import KEPT_ELEMENTS, clear_dropped, keep_mask, random_keys
from cfusion.models.linear import LARGE, product

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
        bias = None if bias is None else bias.repeat_interleave(heads, dim=0)[:, None]
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        few = len(q) * queries * key.shape[2] <= KEPT_ELEMENTS
        for matrices, rows in _parts(q, k):
            weights = attention_weights(q[matrices, rows], k[matrices], None if bias is None else bias[matrices])
            if dropout:
                mask = _mask(keys, matrices, rows, dropout, weights.dtype)
                kept += [weights.clone(), mask] if few else []
                clear_dropped(weights, mask)
            out[matrices, rows] = _products(weights, v[matrices]).mul_(1 / (1 - dropout))
        ctx.save_for_backward(q, k, v, bias, out, *(kept or keys))
        ctx.dropout, ctx.heads, ctx.kept = dropout, heads, bool(kept)
        return out.unflatten(0, (bags, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of query, key and value."""
        q, k, v, bias, out, *saved = ctx.saved_tensors
        grad = grad.flatten(0, 1)
        # With the upscaling moved into the incoming gradient, the mask only clears entries.
        grad_out = (grad * (1 / (1 - ctx.dropout))).contiguous()
        delta = (grad * out).sum(dim=2, keepdim=True)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, (matrices, rows) in enumerate(_parts(q, k)):
            at = matrices, rows
            if ctx.kept:
                weights, mask = saved[2 * number].clone(), saved[2 * number + 1]
            else:
                weights = attention_weights(q[at], k[matrices], None if bias is None else bias[matrices])
            grad_scores = _products(grad_out[at], v[matrices].mT)
            if ctx.dropout:
                if not ctx.kept:
                    mask = _mask(saved, matrices, rows, ctx.dropout, weights.dtype)
                clear_dropped(grad_scores, mask)
            grad_scores.sub_(delta[at]).mul_(weights)
            if ctx.dropout:
                clear_dropped(weights, mask)
            grad_v[matrices] += _products(weights.mT, grad_out[at])
            grad_q[at] = _products(grad_scores, k[matrices])
            grad_k[matrices] += _products(grad_scores.mT, q[at])
        grad_q.mul_(q.shape[2] ** -0.5)
        return *(t.unflatten(0, (-1, ctx.heads)) for t in (grad_q, grad_k, grad_v)), None, None


def _parts(query: Tensor, key: Tensor) -> list[tuple[slice, slice]]:
    """Split the work: heads of bags [bag × head], and their queries, that are computed at a time.

    Small heads are computed together: one by one, the calls would cost more than the arithmetic.
    """
    matrices, queries, dim = query.shape
    multiplications = queries * key.shape[1] * dim
    together = 1 if multiplications >= LARGE else max(1, CHUNK_ELEMENTS // (queries * key.shape[1]))
    return [
        (slice(first, first + together), rows)
        for first in range(0, matrices, together)
        for rows in query_chunks(queries, key.shape[1], together)
    ]


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [matrix, row, inner] by [matrix, inner, column]."""
    return product(left[0], right[0])[None] if len(left) == 1 else left @ right


def _mask(keys: list[Tensor], matrices: slice, rows: slice, dropout: float, dtype: torch.dtype) -> Tensor:
    row_key, column_key = keys
    return keep_mask(row_key[matrices, rows], column_key[matrices], dropout, dtype)


def query_chunks(queries: int, keys: int, matrices: int) -> list[slice]:
    """Yield ranges of queries whose weights over all keys fit the cache."""
    size = max(SMALLEST_CHUNK, CHUNK_ELEMENTS // (keys * matrices))
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the softmax over the keys of scaled queries times keys, plus `bias` where a key is left out."""
    scores = _products(query, key.mT) if query.dim() == 3 else query @ key.mT
    return F.softmax(scores if bias is None else scores.add_(bias), dim=-1)
