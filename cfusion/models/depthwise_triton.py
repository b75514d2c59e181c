"""Depthwise convolution of channels-last images by Triton; imported only where `parallel.depthwise` asks for it.

The gradient of the image is the same convolution of the output's gradient, with the kernels turned by 180°. The
gradient of the kernels is summed in parts of the image, and the parts are added up in a fixed order, so that the same
input gives the same bits. Sums are in f32, or in f64 for f64 images. Arguments of the kernels have no annotations:
Triton reads them as code.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

PLACES, CHANNELS = 32, 64
"""Cells of the image, and channels, that one program computes at a time."""

PART = 512
"""Cells over which one program sums the gradient of a row of the kernels."""


def convolve(
    grid: Float[Tensor, "bag height width dim"], kernel: Float[Tensor, "dim 1 k k"], bias: Float[Tensor, " dim"] | None
) -> Float[Tensor, "bag height width dim"]:
    """Convolve each channel with its own kernel of odd size, zero-padded; on a GPU, or in Triton's interpreter."""
    found: Tensor = _Depthwise.apply(grid, kernel, bias)
    return found


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        grid = grid.contiguous()
        ctx.save_for_backward(grid, kernel)
        out = _convolved(grid, kernel)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grid, kernel = ctx.saved_tensors
        of_grid, of_kernel, of_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            _convolved(gradient, kernel.flip(2, 3)) if of_grid else None,
            _kernel_gradient(grid, gradient, kernel.shape[-1]).to(kernel.dtype) if of_kernel else None,
            gradient.sum((0, 1, 2)) if of_bias else None,
        )


def _convolved(grid: Tensor, kernel: Tensor) -> Tensor:
    bags, height, width, dim = grid.shape
    out, taps = torch.empty_like(grid), kernel.flatten(1).T.contiguous()
    programs = triton.cdiv(bags * height * width, PLACES), triton.cdiv(dim, CHANNELS)
    _convolution[programs](
        grid, taps, out, bags * height * width, height, width, dim,
        SIZE=kernel.shape[-1], PLACES=PLACES, CHANNELS=CHANNELS, SUMS=_sums(grid),
    )  # fmt: skip
    return out


def _kernel_gradient(grid: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Return the gradient of the kernels, [dim, 1, size, size], in the type of the sums."""
    bags, height, width, dim = grid.shape
    cells = bags * height * width
    parts, columns = triton.cdiv(cells, PART), triton.next_power_of_2(size)
    dtype = torch.float64 if grid.dtype == torch.float64 else torch.float32
    sums = torch.empty(parts, size, columns, dim, dtype=dtype, device=grid.device)
    _row_gradient[(parts, size, triton.cdiv(dim, CHANNELS))](
        grid, gradient, sums, cells, height, width, dim,
        SIZE=size, COLUMNS=columns, PART=PART, PLACES=16, CHANNELS=CHANNELS, SUMS=_sums(grid),
    )  # fmt: skip
    return sums.sum(0)[:, :size].permute(2, 0, 1)[:, None]


def _sums(grid: Tensor) -> Any:
    return tl.float64 if grid.dtype == torch.float64 else tl.float32


@triton.jit
def _convolution(
    grid, taps, out, cells, height, width, dim,
    SIZE: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, column = cell // width % height, cell % width
    real = channel < dim
    total = tl.zeros((PLACES, CHANNELS), SUMS)
    for tap in tl.static_range(SIZE * SIZE):
        down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        inside = (cell < cells) & (row + down >= 0) & (row + down < height) & (column + right >= 0)
        inside = inside & (column + right < width)
        source = (cell + down * width + right).to(tl.int64)
        values = tl.load(
            grid + source[:, None] * dim + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        weight = tl.load(taps + tap * dim + channel, mask=real, other=0.0)
        total += values.to(SUMS) * weight.to(SUMS)[None, :]
    place = cell.to(tl.int64)[:, None] * dim + channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(cell < cells)[:, None] & real[None, :])


@triton.jit
def _row_gradient(
    grid, gradient, sums, cells, height, width, dim,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    part, down = tl.program_id(0), tl.program_id(1) - SIZE // 2
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    right = tl.arange(0, COLUMNS) - SIZE // 2
    real = channel < dim
    total = tl.zeros((COLUMNS, CHANNELS), SUMS)
    for first in range(0, PART, PLACES):
        cell = part * PART + first + tl.arange(0, PLACES)
        row, column = cell // width % height + down, cell % width
        known = cell < cells
        place = cell.to(tl.int64)[:, None] * dim + channel[None, :]
        from_output = tl.load(gradient + place, mask=known[:, None] & real[None, :], other=0.0)
        near = column[:, None] + right[None, :]
        inside = (known & (row >= 0) & (row < height))[:, None] & (near >= 0) & (near < width)
        source = (cell + down * width).to(tl.int64)[:, None] + right[None, :]
        values = tl.load(
            grid + source[:, :, None] * dim + channel[None, None, :],
            mask=inside[:, :, None] & real[None, None, :],
            other=0.0,
        )
        total += tl.sum(values.to(SUMS) * from_output.to(SUMS)[:, None, :], axis=0)
    line = (part * SIZE + tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + line.to(tl.int64)[:, None] * dim + channel[None, :], total, mask=real[None, :])
