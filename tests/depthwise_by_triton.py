"""Prints how far Triton's depthwise convolutions are from torch's, as JSON; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import json
import sys

import torch

from cfusion.models.depthwise import depthwise
from cfusion.models.depthwise_triton import convolve

CASES = [((1, 5, 7, 3), 7), ((2, 9, 4, 70), 3), ((1, 1, 1, 5), 5), ((1, 25, 23, 2), 7)]
"""Shape of the grid and size of the kernels: fewer and more cells and channels than one program computes."""


def differences(shape: tuple[int, ...], size: int, dtype: torch.dtype, *, biased: bool) -> dict[str, float]:
    """The largest difference of the output and of each gradient; the tensors are views."""
    torch.manual_seed(0)
    bags, height, width, dim = shape
    grid = torch.randn(bags, width, height, dim, dtype=dtype).transpose(1, 2).requires_grad_()
    kernel = torch.randn(size, size, dim, 1, dtype=dtype).permute(2, 3, 0, 1).requires_grad_()
    bias = torch.randn(dim, dtype=dtype, requires_grad=True) if biased else None
    inputs = [tensor for tensor in (grid, kernel, bias) if tensor is not None]
    incoming = torch.randn(bags, dim, height, width, dtype=dtype).permute(0, 2, 3, 1)
    outputs = convolve(grid, kernel, bias), depthwise(grid, kernel, bias)
    gradients = [torch.autograd.grad(output, inputs, incoming) for output in outputs]
    assert all(gradient.dtype == dtype for gradient in gradients[0])
    pairs = {"output": outputs, **dict(zip(("grid", "kernel", "bias"), zip(*gradients, strict=True), strict=False))}
    return {name: (one - other).abs().max().item() for name, (one, other) in pairs.items()}


if __name__ == "__main__":
    found = {
        f"{shape} {size} {dtype} biased={biased}": differences(shape, size, dtype, biased=biased)
        for shape, size in CASES
        for dtype, biased in ((torch.float64, True), (torch.float64, False), (torch.float32, True))
    }
    json.dump(found, sys.stdout)
