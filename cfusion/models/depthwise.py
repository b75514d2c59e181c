"""Depthwise convolutions on tokens as they lie in memory, by torch or by Triton.

On a GPU torch gives a channels-last image to cuDNN, whose gradient of the weights is slow for many channels with a
small kernel each. `depthwise_triton` has kernels for this layout; torch's convolution is what they are tested against.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cfusion.errors import ConfigError

_by_triton = False


def choose_depthwise(library: Literal["torch", "triton"], *, on_cpu: bool) -> None:
    """Choose for the process which library convolves on a GPU; a CPU always uses torch.

    Raises:
        ConfigError: Triton is chosen, and there is no GPU or it is not installed.
    """
    global _by_triton
    if library == "triton" and on_cpu:
        raise ConfigError("parallel.depthwise=triton needs a GPU; none is visible.", "Set parallel.depthwise=torch.")
    if library == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "parallel.depthwise=triton: the package triton is not installed.",
            "Install the CUDA build of torch, which brings triton, or set parallel.depthwise=torch.",
        )
    _by_triton = library == "triton"


def depthwise(
    grid: Float[Tensor, "bag height width dim"], kernel: Float[Tensor, "dim 1 k k"], bias: Float[Tensor, " dim"] | None
) -> Float[Tensor, "bag height width dim"]:
    """Convolve each channel with its own kernel, zero-padded."""
    if _by_triton and grid.device.type == "cuda":
        from cfusion.models.depthwise_triton import convolve

        if torch.is_autocast_enabled("cuda"):  # as it does for torch's convolution
            dtype = torch.get_autocast_dtype("cuda")
            grid, kernel, bias = grid.to(dtype), kernel.to(dtype), None if bias is None else bias.to(dtype)
        return convolve(grid, kernel, bias)
    image = grid.permute(0, 3, 1, 2)
    out = F.conv2d(image, kernel, bias, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])
    return out.permute(0, 2, 3, 1)
