"""Attention over bags of new lengths, with and without cuDNN, which plans each length separately."""

from __future__ import annotations

import functools
import statistics

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Limit
from benchmarks.gpu.timing import seconds_once
from cfusion.models.attention import CrossAttention

DIM, HEADS = 512, 4


def measure(bench: Bench) -> None:
    """Visit bags of different lengths twice: a backend that plans each length is slow at the first visit."""
    lengths = (64, 96) if bench.quick else tuple(range(2500, 3700, 100))
    before = torch.backends.cuda.cudnn_sdp_enabled() if bench.on_gpu else False
    try:
        for number, cudnn in enumerate((False, True) if bench.on_gpu else (False,)):
            if bench.on_gpu:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
            who = "cuDNN first in line" if cudnn else "as the program sets it"
            _visit(bench, who, [length + number for length in lengths], limited=not cudnn)
    finally:
        if bench.on_gpu:
            torch.backends.cuda.enable_cudnn_sdp(before)


def _visit(bench: Bench, who: str, lengths: list[int], *, limited: bool) -> None:
    module = CrossAttention(DIM, HEADS).to(bench.device)
    for length in lengths[:1]:  # cuBLAS and the allocator start
        _step(bench, module, length - 1)
    times: dict[str, list[float]] = {"first": [], "again": []}
    broken = 0
    for visit in times.values():
        for length in lengths:
            result: list[bool] = []
            visit.append(seconds_once(functools.partial(_noted, result, bench, module, length)))
            broken += not result[0]
    first, again = (1e3 * statistics.median(times[name]) for name in ("first", "again"))
    limit = Limit(2.0, speed=True) if limited else None
    bench.tell(f"n × 4n cross-attention, {who}: length seen before", again, "ms")
    bench.tell(f"n × 4n cross-attention, {who}: new length, against seen", first / again, "times", limit)
    bench.tell(f"n × 4n cross-attention, {who}: gradients not finite", float(broken), "", Limit(0) if limited else None)


def _noted(result: list[bool], bench: Bench, module: CrossAttention, length: int) -> None:
    result.append(_step(bench, module, length))


def _step(bench: Bench, module: CrossAttention, length: int) -> bool:
    """Forward and backward in bf16; return whether the gradient is finite."""
    source = torch.randn(1, length, DIM, device=bench.device, requires_grad=True)
    context = torch.randn(1, 4 * length, DIM, device=bench.device)
    with torch.autocast(bench.device.type, torch.bfloat16):
        output: Tensor = module(source, context, None)
    output.float().square().mean().backward()
    assert source.grad is not None
    return bool(source.grad.isfinite().all())
