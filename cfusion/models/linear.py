"""Matrix products and linear maps, with whichever of PyTorch's two libraries is faster on this processor.

On x86 PyTorch gives f32 products to MKL, which uses only AVX2 on non-Intel processors. If these have AVX-512,
oneDNN,
which PyTorch also contains, is twice as fast: 250 GFLOP/s against 115 on a core of a Zen 5. Each new shape costs
oneDNN about .3 ms, which very small products do not recover.
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
"""Minimum number of multiplications for which oneDNN is used."""


class Linear(nn.Linear):
    """`torch.nn.Linear`, with large f32 products on a CPU by the faster library; equal except for rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)


def linear(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply values [..., in] by the transpose of weight [out, in], and add bias [out]."""
    if not by_onednn(values, weight, values.numel() * len(weight)):
        return F.linear(values, weight, bias)
    return _Linear.apply(values.flatten(0, -2), weight, bias).unflatten(0, values.shape[:-1])


def product(left: Float[Tensor, "row inner"], right: Float[Tensor, "inner column"]) -> Float[Tensor, "row column"]:
    """Multiply left by right, without recording a gradient."""
    if not by_onednn(left, right, left.numel() * right.shape[1]):
        return left @ right
    return _onednn(left, right.T, None)


def by_onednn(left: Tensor, right: Tensor, multiplications: int) -> bool:
    """Whether oneDNN pays for a product of these two."""
    plain = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return plain and multiplications >= LARGE and onednn_is_faster() and not torch.is_autocast_enabled("cpu")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether MKL leaves this processor's AVX-512 unused. Not timed, because runs must reproduce the same bits."""
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
    """Call the linear layer under `torch.compile` on a CPU; unlike `to_mkldnn`, it copies nothing."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(values), _dense(weight), bias, "none", [], "")
    return found


def _dense(matrix: Tensor) -> Tensor:
    """Remove gaps between rows or columns, for which oneDNN has only slow loops."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
