"""Settings that are off until this run shows that they pay, each against the default."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.steps import CHANNELS, REFERENCE, bag, share, stepper, width
from benchmarks.gpu.timing import seconds_per_call
from cfusion.config import ParallelConfig
from cfusion.data.batches import pack
from cfusion.errors import ConfigError
from cfusion.models import build_model
from cfusion.models.baselines import AMIL
from cfusion.models.wide_products import stacked, wide_logits
from cfusion.training import checkpoint
from cfusion.training.checkpoint import Checkpoints, TrainState
from cfusion.training.runtime import Runtime
from cfusion.training.snapshot import Snapshot
from cfusion.training.step import Share, Stepper
from cfusion.training.world import join_world
from cfusion.types import Targets

FOLDS = 5


def measure(bench: Bench) -> None:
    """Time steps of small and of large bags, wide folds, and checkpoints."""
    sizes = (64, 96) if bench.quick else (1024, REFERENCE)
    for tiles in sizes:
        _steps(bench, tiles)
    _wide_folds(bench, sizes[0])
    _checkpoints(bench, sizes[0])


def _steps(bench: Bench, tiles: int) -> None:
    """Time a step of several bags with the default settings, and with each setting that changes a step."""
    bags = 2 if bench.quick else 8
    one = share(bench, tiles)
    packed = _packed(bench, tiles, bags)
    cases: list[tuple[str, dict[str, Any], list[Share]]] = [
        ("default", {}, [one] * bags),
        ("parallel.hold_casts", {"hold_casts": True}, [one] * bags),
        ("train.fused_optimizer", {}, [one] * bags),
        (f"train.packed, {bags} bags a pass", {}, [packed]),
        ("parallel.depthwise=triton", {"depthwise": "triton"}, [one] * bags),
        ("train.packed and parallel.depthwise=triton", {"depthwise": "triton"}, [packed]),
    ]
    for name, settings, shares in cases:
        case = f"{tiles:,} tiles, bf16: a step of {bags} bags, {name}"
        if bench.left < 0:
            bench.skip(case, "no time left in this part")
            continue
        try:
            runtime = join_world(ParallelConfig(precision="bf16", global_batch=bags, **settings))
        except ConfigError as error:
            bench.skip(case, error.message)
            continue
        steps = stepper(bench, runtime, fused=name == "train.fused_optimizer")
        _tell(bench, case, functools.partial(steps.step, shares, cases=bags, lr=1e-6))
        runtime.release()
    join_world(ParallelConfig(global_batch=1))  # torch's convolutions again


def _packed(bench: Bench, tiles: int, bags: int) -> Share:
    targets = Targets(torch.full((bags,), 1), torch.full((bags,), True), torch.full((bags,), 12.0)).to(bench.device)
    return Share(pack([bag(bench, tiles)] * bags), targets, torch.ones(bags, device=bench.device), seed=tiles)


def _wide_folds(bench: Bench, tiles: int) -> None:
    """Time forward and backward of a bag by the folds of gated attention, one by one and as one wide product."""
    torch.manual_seed(0)
    models = [
        build_model("amil", backbone_dim=CHANNELS, embed_dim=width(bench)).to(bench.device).train()
        for _ in range(FOLDS)
    ]
    runtime, one = join_world(ParallelConfig(precision="bf16", global_batch=1)), bag(bench, tiles)

    def one_by_one() -> None:
        for model in models:
            with runtime.autocast():
                loss = model(one).logits.sum()
            loss.backward()

    def wide() -> None:
        first = models[0]
        assert isinstance(first, AMIL)
        parameters = {name: tensor.requires_grad_() for name, tensor in stacked(models).items()}
        with runtime.autocast():
            loss = wide_logits(first, parameters, one).sum()
        loss.backward()

    for name, call in (("one by one", one_by_one), ("train.wide_folds", wide)):
        _tell(bench, f"{tiles:,} tiles, bf16: a bag by {FOLDS} folds of amil, {name}", call)


def _checkpoints(bench: Bench, tiles: int) -> None:
    """Time a step with a checkpoint after it, written at once or by a thread."""
    with mock.patch.object(checkpoint, "INTERVAL_SECONDS", -1.0):
        for background in (False, True):
            runtime = join_world(ParallelConfig(precision="bf16", global_batch=1))
            with tempfile.TemporaryDirectory() as folder:
                _saving(bench, stepper(bench, runtime), share(bench, tiles), Path(folder), background=background)
            runtime.release()


def _saving(bench: Bench, steps: Stepper, one: Share, folder: Path, *, background: bool) -> None:
    runtime: Runtime = steps.runtime
    steps.step([one], cases=1, lr=1e-6)
    snapshot = Snapshot(runtime.parts(runtime.accelerator.unwrap_model(steps.model), steps.optimizer))
    checkpoints, state = Checkpoints(folder, {}, runtime, background=background), TrainState()

    def step() -> None:
        steps.step([one], cases=1, lr=1e-6)
        state.step += 1
        checkpoints.save(state, snapshot, now=False)

    name = "train.background_checkpoints" if background else "default"
    with checkpoints.settling():
        _tell(bench, f"{one.batch.name(0)}, bf16: a step and a checkpoint when it is due, {name}", step)


def _tell(bench: Bench, case: str, call: Callable[[], object]) -> None:
    if bench.left < 0:
        bench.skip(case, "no time left in this part")
        return
    bench.tell(case, 1e3 * seconds_per_call(call, max(0.2, bench.left / 20)), "ms")
