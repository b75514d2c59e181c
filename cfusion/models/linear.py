"""Products of matrices and linear maps, by whichever of PyTorch's two libraries is the faster one on this processor.

On x86 PyTorch gives products in f32 to MKL, which on other processors than Intel's stays at AVX2. Where these have
AVX-512, oneDNN, which PyTorch carries too, is twice as fast: 250 GFLOP/s against 115 on a core of a Zen 5. A shape that
it has not met costs it about .3 ms, which very small products are not worth.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LARGE = 1 << 25
"""Multiplications from which on oneDNN is asked."""


class Linear(nn.Linear):
    """`torch.nn.Linear`, with large products in f32 on a CPU by the faster library; equal but for rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)


def linear(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Values [..., in] times the transpose of weight [out, in], plus bias [out]."""
    if not by_onednn(values, weight, values.numel() * len(weight)):
        return F.linear(values, weight, bias)
    return _Linear.apply(values.flatten(0, -2), weight, bias).unflatten(0, values.shape[:-1])


def product(left: Float[Tensor, "row inner"], right: Float[Tensor, "inner column"]) -> Float[Tensor, "row column"]:
    """Left times right, for which no gradient is recorded."""
    if not by_onednn(left, right, left.numel() * right.shape[1]):
        return left @ right
    return _onednn(left, right.T, None)


def by_onednn(left: Tensor, right: Tensor, multiplications: int) -> bool:
    """Whether a product of these two is worth oneDNN."""
    plain = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return plain and multiplications >= LARGE and onednn_is_faster() and not torch.is_autocast_enabled("cpu")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether MKL leaves the AVX-512 of this processor unused. Not timed: a run has to end with the same bits again."""
    cpus = Path("/proc/cpuinfo")
    other = cpus.is_file() and "GenuineIntel" not in cpus.read_text()
    return (
        other
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, weight)
        return _onednn(values, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        of_values, of_weight, of_bias = ctx.needs_input_grad
        return (
            _onednn(gradient, weight.T, None) if of_values else None,
            _onednn(gradient.T, values.T, None) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _onednn(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `torch.compile` calls for a linear layer on a CPU; unlike `to_mkldnn`, it copies nothing."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(values), _dense(weight), bias, "none", [], "")
    return found


def _dense(matrix: Tensor) -> Tensor:
    """The matrix without gaps between its rows or columns, for which oneDNN has nothing but slow loops."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
