"""Linear maps of many tiles, by whichever of PyTorch's two libraries for them is the faster one on this processor.

On x86 PyTorch gives products in f32 to MKL, which on other processors than Intel's stays at AVX2. Where these have
AVX-512, oneDNN, which PyTorch carries too, is twice as fast (205 GFLOP/s against 98 on a core of a Zen 5); a shape that
it has not met costs it about 2 ms, which large products alone are worth.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 1 << 28
"""Multiplications from which on oneDNN is asked."""


class Linear(nn.Linear):
    """`torch.nn.Linear`, with large products in f32 on a CPU by the faster library; equal but for rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in] to [..., out]."""
        if input.numel() * self.out_features < LARGE or not _by_onednn(input, self.weight):
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """A linear map by oneDNN that keeps its input as it was given, not a second time in oneDNN's layout."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, weight)
        # Not F.linear, which DeepSpeed replaces by one of its own that knows no such layout.
        return torch.ops.aten.linear(values.to_mkldnn(), weight, bias).to_dense()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        found = torch.ops.aten.mkldnn_linear_backward(values.to_mkldnn(), gradient.to_mkldnn(), weight, needed)
        return tuple(part.to_dense() if asked else None for part, asked in zip(found, needed, strict=True))


def _by_onednn(values: Tensor, weight: Tensor) -> bool:
    plain = values.device.type == "cpu" and values.dtype == weight.dtype == torch.float32
    return plain and onednn_is_faster() and not torch.is_autocast_enabled("cpu")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether MKL leaves the AVX-512 of this processor unused. Not timed: a run has to end with the same bits again."""
    cpus = Path("/proc/cpuinfo")
    other = cpus.is_file() and "GenuineIntel" not in cpus.read_text()
    return (
        other
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
