"""A training step of CrossFusion by bag size: time, share of the peak, kernels, memory; and alternatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

from benchmarks.gpu.bench import Bench, Limit
from benchmarks.gpu.timing import kernels, seconds_once, seconds_per_call
from benchmarks.model_step import Widths, flops
from cfusion.config import ParallelConfig, TrainConfig
from cfusion.models import build_model
from cfusion.survival.losses import LOSSES
from cfusion.training.optimizers import make_optimizer
from cfusion.training.runtime import Runtime
from cfusion.training.step import Share, Stepper
from cfusion.training.world import join_world
from cfusion.types import BagBatch, Targets

CHANNELS, BINS, REFERENCE = 1536, 4, 12_288
TILES = (1024, 4096, REFERENCE, 32_768, 65_536)
COMPILING_SECONDS = 90.0
"""Time that must be left for a compilation of the model to be tried."""


def width(bench: Bench) -> int:
    """Width of the model's tokens."""
    return 64 if bench.quick else 512


def bag(bench: Bench, tiles: int) -> BagBatch:
    """A made-up bag on the device, with `tiles` tiles at 20x."""
    generator = torch.Generator(bench.device).manual_seed(tiles)
    counts = {"x20": tiles, "x10": -(-tiles // 4), "x5": -(-tiles // 16)}
    made = {
        name: torch.randn(1, count, CHANNELS, device=bench.device, generator=generator)
        for name, count in counts.items()
    }
    return BagBatch(made, case_ids=(f"{tiles} tiles",))


def share(bench: Bench, tiles: int) -> Share:
    """The bag with an outcome, for a step."""
    targets = Targets(torch.tensor([1]), torch.tensor([True]), torch.tensor([12.0])).to(bench.device)
    return Share(bag(bench, tiles), targets, torch.ones(1, device=bench.device), seed=tiles)


def network(bench: Bench, **options: Any) -> torch.nn.Module:
    """CrossFusion with the same initial weights at each call."""
    torch.manual_seed(0)
    return build_model("crossfusion", backbone_dim=CHANNELS, n_bins=BINS, embed_dim=width(bench), **options)


def stepper(bench: Bench, runtime: Runtime, *, fused: bool = False) -> Stepper:
    """The model with its optimizer, as a training has them."""
    module = network(bench)
    model, optimizer = runtime.prepare(module, make_optimizer(module, TrainConfig(fused_optimizer=fused)))
    model.train()
    return Stepper(runtime, model, optimizer, LOSSES["nll"], 0.0, 1.0)


def measure(bench: Bench) -> None:
    """Measure all sizes in bf16, the reference in f32, then the alternatives at the reference."""
    sizes = (64, 128) if bench.quick else TILES
    reference = sizes[-1] if bench.quick else REFERENCE
    for tiles in sizes:
        if bench.left < 0:
            bench.skip(f"{tiles} tiles, bf16", "no time left in this part")
            continue
        _size(bench, "bf16", tiles, bench.left / (2 * len(sizes)), reference)
    _size(bench, "f32", reference, bench.left / 4, reference)
    _alternatives(bench, reference)


def _size(bench: Bench, precision: Literal["bf16", "f32"], tiles: int, budget: float, reference: int) -> None:
    runtime = join_world(ParallelConfig(precision=precision, global_batch=1))
    steps, one = stepper(bench, runtime), share(bench, tiles)
    accumulate = functools.partial(steps.accumulate, [one], cases=1)
    what = f"{tiles:,} tiles, {precision}"
    try:
        taken = seconds_per_call(accumulate, budget / 2)
    except torch.OutOfMemoryError:
        bench.skip(what, "does not fit the memory of this GPU")
        runtime.release()
        return
    aimed = tiles == reference and precision == "bf16"
    bench.tell(f"{what}: forward and backward of a bag", 1e3 * taken, "ms", Limit(4, speed=True) if aimed else None)
    share_of_peak = flops(tiles, Widths(CHANNELS, width(bench))) / taken / bench.peak
    aim = Limit(0.35, "least", speed=True) if aimed else None
    bench.tell(f"{what}: arithmetic, share of the matrix product", share_of_peak, "", aim)
    if bench.on_gpu:
        count, busy = kernels(accumulate)
        bench.tell(f"{what}: kernels of a bag", float(count))
        bench.tell(f"{what}: time in which kernels run", 1e3 * busy, "ms")
        bench.tell(f"{what}: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
        torch.cuda.reset_peak_memory_stats()
    if tiles == reference:
        _rest_of_a_step(bench, what, steps, one, budget)
    runtime.release()


def _rest_of_a_step(bench: Bench, what: str, steps: Stepper, one: Share, budget: float) -> None:
    """Time the update, once a global batch, and a forward pass of evaluation."""

    def step() -> None:
        steps.step([one], cases=1, lr=1e-6)

    def evaluate() -> None:
        with torch.no_grad(), steps.runtime.autocast():
            steps.model(one.batch)

    complete = seconds_per_call(step, budget / 4)
    bench.tell(f"{what}: a step of one bag, with its update", 1e3 * complete, "ms")
    steps.model.eval()
    bench.tell(f"{what}: evaluation of a bag", 1e3 * seconds_per_call(evaluate, budget / 4), "ms")


def _alternatives(bench: Bench, tiles: int) -> None:
    """Time what the program does not do by default, at the reference size."""
    if not bench.on_gpu:
        bench.skip("alternatives: cuDNN's attention, torch.compile", "they concern a GPU only")
        return
    runtime = join_world(ParallelConfig(precision="bf16", global_batch=1))
    one = share(bench, tiles)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        _alternative(bench, "attention by cuDNN, a length seen before", lambda: stepper(bench, runtime), one)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
    if bench.left < COMPILING_SECONDS:
        bench.skip("alternative: torch.compile(dynamic=True)", "no time left in this part")
        return

    def compiled() -> Stepper:
        steps = stepper(bench, runtime)
        steps.model.compile(dynamic=True)
        return steps

    _alternative(bench, "torch.compile(dynamic=True)", compiled, one)


def _alternative(bench: Bench, name: str, build: Callable[[], Stepper], one: Share) -> None:
    try:
        steps = build()
        accumulate = functools.partial(steps.accumulate, [one], cases=1)
        first = seconds_once(accumulate)
        taken = seconds_per_call(accumulate, bench.left / 4)
    except Exception as error:  # noqa: BLE001 - an alternative that cannot run here is a row
        bench.skip(f"alternative: {name}", repr(error)[:200])
        return
    bench.tell(
        f"alternative: {name}: forward and backward of a bag", 1e3 * taken, "ms", note=f"first call {first:.1f} s"
    )
