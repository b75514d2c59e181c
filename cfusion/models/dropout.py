"""Dropout whose mask is computed twice instead of drawn and stored.

An entry of the mask is a function of its row and column: a key drawn for the row XOR a key drawn for the column,
multiplied by an odd number, compared with a threshold. Any three entries are independent; over the corners of a
rectangle the correlation is below 1e-4. On a CPU this integer arithmetic costs a tenth of drawing from a generator,
and the backward pass repeats it. On a GPU PyTorch's own kernels do the same, and are used.

Keys come from a generator per thread, see `seeded`. PyTorch's own generator is shared by all threads, so models that
train in parallel would draw from each other's numbers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ODD = -1640531527
"""2³² divided by the golden ratio, as a signed odd integer (multiplicative hashing; Knuth, TAOCP 3, 6.4)."""

KEPT_ELEMENTS = 1 << 18
"""Masks of at most this many entries are kept for the backward pass: computing them again would cost more calls than
arithmetic."""

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


_thread = threading.local()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Make all dropout of this thread depend only on the seed within the block; on a GPU, seed PyTorch's generators."""
    if device.type != "cpu":
        torch.manual_seed(seed)
    _thread.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        del _thread.generator


def random_keys(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw 32 random bits for each row or column, from the thread's generator, or else PyTorch's default one."""
    generator = getattr(_thread, "generator", None) if device.type == "cpu" else None
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)


def random_normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draw standard normal numbers of `like`'s dtype on its device, from the thread's generator as `random_keys`."""
    generator = getattr(_thread, "generator", None) if like.device.type == "cpu" else None
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def keep_mask(row_key: Tensor, column_key: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """Compute the mask: all bits set where an entry is kept, none where it is dropped; integers as wide as `dtype`."""
    bits = torch.bitwise_xor(row_key, column_key).mul_(ODD)
    # An arithmetic shift spreads the sign of a uniform number, which is shifted to be negative with the probability
    # of being kept.
    bits.bitwise_right_shift_(1).add_(round((dropout - 0.5) * 2**31)).bitwise_right_shift_(31)
    return bits.to(_INTEGER[dtype.itemsize])


def clear_dropped(values: Tensor, mask: Tensor) -> Tensor:
    """Set the dropped values to zero, in place."""
    values.view(mask.dtype).bitwise_and_(mask)
    return values


class Dropout(nn.Module):
    """Zero a share of the entries and scale the others up, only in training.

    Args:
        share: In [0, 1).
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: Tensor) -> Tensor:
        """Drop some of the values."""
        if not self.training or not self.share:
            return values
        if values.device.type != "cpu":
            return nn.functional.dropout(values, self.share)
        return _Dropped.apply(values, self.share)

    def extra_repr(self) -> str:
        """Return the share, for printing."""
        return f"{self.share:g}"


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float) -> Tensor:
        row_key = random_keys((*values.shape[:-1], 1), values.device)
        column_key = random_keys((values.shape[-1],), values.device)
        mask = keep_mask(row_key, column_key, share, values.dtype)
        ctx.save_for_backward(*([mask] if values.numel() <= KEPT_ELEMENTS else [row_key, column_key]))
        ctx.share = share
        return clear_dropped(values * (1 / (1 - share)), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if len(ctx.saved_tensors) == 1:
            (mask,) = ctx.saved_tensors
        else:
            row_key, column_key = ctx.saved_tensors
            mask = keep_mask(row_key, column_key, ctx.share, grad.dtype)
        return clear_dropped(grad * (1 / (1 - ctx.share)), mask), None
