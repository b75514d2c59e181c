"""Depthwise 7×7 convolutions in the layouts and libraries that there are, against the speed of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import seconds_per_call
from cfusion.errors import ConfigError
from cfusion.models.depthwise import choose_depthwise, depthwise


def measure(bench: Bench) -> None:
    """Time forward and backward on the grid of 3,136 tokens: as the model does it, then the alternatives."""
    channels, side = (32, 8) if bench.quick else (512, 56)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        weight = torch.randn(channels, 1, 7, 7, device=bench.device, dtype=dtype, requires_grad=True)
        grid = torch.randn(1, side, side, channels, device=bench.device, dtype=dtype, requires_grad=True)
        gradient = torch.randn_like(grid)
        # Read and write the grid once in each of three passes: output, gradient of the grid, gradient of the weights.
        bytes_moved = 6 * grid.numel() * grid.element_size()

        def ours(grid: Tensor = grid, weight: Tensor = weight, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(depthwise(grid, weight, None), (grid, weight), gradient)

        _tell(bench, f"{name}, as the model does it (channels last)", ours, bytes_moved)
        _by_triton(bench, name, ours, bytes_moved)
        image = grid.detach().permute(0, 3, 1, 2).contiguous().requires_grad_()
        out = gradient.permute(0, 3, 1, 2).contiguous()

        def contiguous(image: Tensor = image, weight: Tensor = weight, out: Tensor = out) -> None:
            made = F.conv2d(image, weight, padding=3, groups=channels)
            torch.autograd.grad(made, (image, weight), out)

        if not bench.on_gpu:
            _tell(bench, f"{name}, contiguous", contiguous, bytes_moved)
            continue
        for enabled in (True, False):
            with torch.backends.cudnn.flags(enabled=enabled, allow_tf32=False):
                who = "cuDNN" if enabled else "torch's own kernel"
                _tell(bench, f"{name}, contiguous, {who}", contiguous, bytes_moved)


def _by_triton(bench: Bench, name: str, call: Callable[[], None], bytes_moved: int) -> None:
    """Time the same with `parallel.depthwise=triton`, where it can be chosen."""
    case = f"{name}, parallel.depthwise=triton (channels last)"
    try:
        choose_depthwise("triton", on_cpu=not bench.on_gpu)
    except ConfigError as error:
        bench.skip(f"7×7, forward and backward, {case}", error.message)
        return
    try:
        _tell(bench, case, call, bytes_moved)
    finally:
        choose_depthwise("torch", on_cpu=not bench.on_gpu)


def _tell(bench: Bench, case: str, call: object, bytes_moved: int) -> None:
    assert callable(call)
    taken = seconds_per_call(call, max(0.2, bench.left / 12))
    note = f"{bytes_moved / taken / 1e9:.0f} GB/s of the bytes that it must move"
    bench.tell(f"7×7, forward and backward, {case}", 1e3 * taken, "ms", note=note)
