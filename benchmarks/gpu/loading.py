"""Epochs of training read from shards, against the same bags at hand: what the GPU waits for the loader."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, Limit
from benchmarks.gpu.steps import width
from benchmarks.gpu.timing import seconds_once, synchronize
from benchmarks.scaling import write_run
from cfusion.cohort.read import read_cohort
from cfusion.cohort.splits import make_splits
from cfusion.config import load_config
from cfusion.data.shards import open_shards
from cfusion.survival.losses import LOSSES
from cfusion.training.fold_job import targets_of
from cfusion.training.folds import ReadyFold, ready_fold
from cfusion.training.inference import predict_logits
from cfusion.training.loop import train_fold
from cfusion.training.optimizers import make_optimizer
from cfusion.training.runtime import Runtime
from cfusion.training.step import Share, Stepper
from cfusion.training.world import join_world
from cfusion.types import Targets

TRAINED, VALIDATED = 312_480, 78_120
"""Bags of the study's CrossFusion column: 6 cohorts × 5 folds × 30 epochs, under the protocol `strict`."""


def measure(bench: Bench) -> None:
    """Measure one epoch for each cache and number of reading threads, after a first one that warms the pages."""
    slides, cells = (12, 2) if bench.quick else (48, 768)
    best: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_run(
            folder, slides, cells, model={"embed_dim": width(bench)},
            parallel={"precision": "bf16" if bench.on_gpu else "f32"},
        )  # fmt: skip
        for cache, threads in (("page", 2), ("page", 8), ("gpu", 2)):
            case = f"cache {cache}, {threads} threads"
            if cache == "gpu" and not bench.on_gpu:
                bench.skip(case, "no GPU")
                continue
            if bench.left < 0:
                bench.skip(case, "no time left in this part")
                continue
            found = _epoch(bench, path, folder / f"{cache}{threads}", cache, threads)
            best = min(best, found) if best else found
    if best is None or not bench.on_gpu or bench.quick:
        bench.skip("study's CrossFusion column, extrapolated", "only from an epoch on a GPU at full size")
        return
    minutes = (TRAINED * best[0] + VALIDATED * best[1]) / 60
    note = "EXTRAPOLATED from this epoch: every bag as long as these, one run at a time, without scores and files"
    bench.tell("study's CrossFusion column, one GPU", minutes, "min", Limit(45, speed=True), note)


def _epoch(bench: Bench, path: Path, folder: Path, cache: str, threads: int) -> tuple[float, float]:
    """Return seconds a bag of training and of evaluation."""
    config = load_config(path, [f"data.cache={cache}", f"data.read_threads={threads}"])
    runtime = join_world(config.parallel)
    cohort = read_cohort(config.cohort)
    split = make_splits(cohort, config.splits, config.evaluation.protocol)[0]
    split = dataclasses.replace(split, train=(*split.train, *split.test))
    dataset = open_shards(config.data)
    fold = ready_fold(config, cohort, split, dataset, runtime, folder=folder, on_epoch=None)
    model, optimizer = runtime.prepare(fold.network, make_optimizer(fold.network, config.train))
    stepper = Stepper(runtime, model, optimizer, LOSSES["nll"], config.train.alpha, config.train.clip_norm)
    bags, case = fold.job.train, f"cache {cache}, {threads} threads"

    def epoch(name: str) -> None:
        train_fold(runtime, dataclasses.replace(fold.job, folder=folder / name), fold.network, stepper)

    epoch("warm")
    read = seconds_once(lambda: epoch("timed")) / len(bags)
    evaluated = seconds_once(lambda: predict_logits(runtime, fold.network, bags, 1)) / len(bags)
    held = _at_hand(runtime, fold, stepper) / len(bags)
    bench.tell(f"{case}: training a bag, an epoch read", 1e3 * read, "ms")
    bench.tell(f"{case}: training a bag, bags at hand", 1e3 * held, "ms")
    bench.tell(f"{case}: idle share", max(0.0, 1 - held / read), "", Limit(0.05, speed=True))
    bench.tell(f"{case}: evaluating a bag, read", 1e3 * evaluated, "ms")
    if bench.on_gpu:
        bench.tell(f"{case}: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
        torch.cuda.reset_peak_memory_stats()
    runtime.release()
    return read, evaluated


def _at_hand(runtime: Runtime, fold: ReadyFold, stepper: Stepper) -> float:
    """Seconds of the steps of an epoch whose bags are on the device already."""
    bags, size = fold.job.train, fold.job.config.parallel.global_batch
    outcomes = targets_of(fold.job, bags).to(runtime.device)
    ones = torch.ones(1, dtype=runtime.dtype, device=runtime.device)
    numbers = ([number] for number in range(len(bags)))
    stream = bags.loader.stream(numbers, epoch=0, training=True)
    shares = [Share(batch, _row(outcomes, number), ones, seed=number) for number, batch in enumerate(stream)]
    stepper.model.train()
    synchronize()
    start = time.perf_counter()
    for window in _windows(shares, size):
        stepper.step(window, cases=len(window), lr=1e-6)
    synchronize()
    return time.perf_counter() - start


def _row(outcomes: Targets, number: int) -> Targets:
    row = slice(number, number + 1)
    return Targets(outcomes.label[row], outcomes.event[row], outcomes.time_months[row])


def _windows(shares: Sequence[Share], size: int) -> list[Sequence[Share]]:
    return [shares[start : start + size] for start in range(0, len(shares), size)]
