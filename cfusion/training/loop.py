"""Epochs: train, validate, keep the best, stop in time, save, resume."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cfusion.config import Config
from cfusion.data.loader import BagSet
from cfusion.data.partition import MicroBatch, deal, earlier_draws, epoch_order, global_batches
from cfusion.errors import ConfigError, DataError, RequeueError
from cfusion.survival.bins import TimeBins
from cfusion.survival.losses import LOSSES
from cfusion.survival.metrics import concordance
from cfusion.training.checkpoint import Checkpoints, TrainState
from cfusion.training.inference import patient_survival, predict_logits
from cfusion.training.interruption import stop_requested
from cfusion.training.runtime import Runtime
from cfusion.training.schedule import learning_rate
from cfusion.training.snapshot import Snapshot
from cfusion.training.step import Share, Stepper, dropout_seed
from cfusion.types import SurvivalOutput, Targets


@dataclass(frozen=True)
class FoldJob:
    """One training: a configuration, its bags, and where its state lives.

    Attributes:
        config: The run's configuration.
        train: Training bags.
        validation: Bags that choose the epoch; None under `fixed-epoch`.
        cases: Outcomes by patient: `time_months`, `event`.
        bins: Time bins of the training patients.
        sampling_weights: [bag], for `sampling: weighted`; None otherwise.
        name: Of the training among those of other seeds and folds; its dropout follows from it.
        identity: All of this as plain values, for checkpoints.
        card: What the model is, for whoever reads a checkpoint without the run.
        folder: Where checkpoints go.
        on_epoch: Called on rank 0 with each finished epoch's number and metrics.
    """

    config: Config
    train: BagSet
    validation: BagSet | None
    cases: pd.DataFrame
    bins: TimeBins
    sampling_weights: np.ndarray | None
    name: str
    identity: dict[str, Any]
    card: dict[str, Any]
    folder: Path
    on_epoch: Callable[[int, dict[str, float]], None]


def train_fold(runtime: Runtime, job: FoldJob, model: nn.Module, stepper: Stepper) -> tuple[TrainState, Snapshot]:
    """Train until the epochs or the patience are used up; `model` then computes with the chosen parameters.

    Args:
        runtime: The processes.
        job: What to train on.
        model: The bare model, whose parameters `stepper` moves.
        stepper: The wrapped model with its optimizer and loss.

    Returns:
        The final state, with one row of history per epoch, and its tensors.

    Raises:
        RequeueError: The process was asked to stop; its state is saved.
    """
    train = job.config.train
    snapshot = Snapshot(runtime.parts(model, stepper.optimizer))
    if train.ema:
        snapshot.average = snapshot.parameters()
    checkpoints = Checkpoints(job.folder, job.identity, runtime, keep=train.keep_checkpoints, card=job.card)
    state = checkpoints.load(snapshot) or TrainState()
    runtime.loss_scale = state.loss_scale
    runtime.publish(model, snapshot.parts)
    while state.epoch < train.epochs and not out_of_patience(state, train.patience):
        started = time.monotonic()
        lr = _train_epoch(runtime, job, state, snapshot, stepper, checkpoints)
        metrics = {"train_loss": state.loss_sum / state.samples_seen, "learning_rate": lr}
        with _averaged(runtime, model, snapshot):
            if job.validation is not None:
                logits = predict_logits(runtime, model, job.validation, train.micro_batch)
                metrics |= validation_scores(job, job.validation, logits)
            if is_best(state, metrics, job):
                snapshot.best = snapshot.parameters()
        state.history.append({"epoch": state.epoch, **metrics})
        if runtime.is_main:
            job.on_epoch(state.epoch, {**metrics, "epoch_seconds": time.monotonic() - started})
        state.epoch, state.samples_seen, state.loss_sum = state.epoch + 1, 0, 0.0
    if not snapshot.best:
        raise ConfigError(
            f"No epoch was chosen: train.min_epoch={train.min_epoch}, but training ended after {state.epoch} epochs.",
            "Raise train.epochs or lower train.min_epoch.",
        )
    snapshot.put(snapshot.best)
    runtime.publish(model, snapshot.parts)
    return state, snapshot


def targets_of(job: FoldJob, bags: BagSet) -> Targets:
    """Outcomes of the patients of `bags`, [bag]."""
    rows = job.cases.loc[[bag.case_id for bag in bags.bags]]
    return Targets(
        torch.as_tensor(job.bins.label(rows["time_months"].to_numpy())),
        torch.tensor(rows["event"].to_numpy(dtype=bool)),
        torch.tensor(rows["time_months"].to_numpy(dtype=float)),
    )


def validation_scores(job: FoldJob, bags: BagSet, logits: Tensor) -> dict[str, float]:
    """C-index over patients, and loss over bags; alpha is 0 here, as in the published program."""
    loss = LOSSES[job.config.train.loss](SurvivalOutput.from_logits(logits), targets_of(job, bags), alpha=0.0)
    survival = patient_survival(logits, bags)
    cases = job.cases.loc[survival.index]
    scored = concordance(cases["time_months"].to_numpy(), cases["event"].to_numpy(), -survival.sum(axis=1).to_numpy())
    return {"validation_loss": loss.mean().item(), "validation_cindex": scored.cindex}


def _train_epoch(
    runtime: Runtime, job: FoldJob, state: TrainState, snapshot: Snapshot, stepper: Stepper, checkpoints: Checkpoints
) -> float:
    """The rest of the epoch that `state` stands in; returns the last learning rate."""
    config, costs, lengths = job.config, job.train.costs, job.train.lengths
    order = epoch_order(
        [bag.key for bag in job.train.bags],
        seed=config.data.order_seed,
        epoch=state.epoch,
        weights=job.sampling_weights,
    )
    steps_per_epoch = math.ceil(len(order) / config.parallel.global_batch)
    batches = global_batches(order[state.samples_seen :], config.parallel.global_batch)
    earlier = global_batches(earlier_draws(order)[state.samples_seen :], config.parallel.global_batch)
    plans = [
        deal(
            costs[batch],
            runtime.world_size,
            config.train.micro_batch,
            lengths=lengths[batch],
            token_budget=config.data.token_budget,
        )[runtime.rank]
        for batch in batches
    ]
    shares = _shares(runtime, job, state.epoch, batches, earlier, plans)
    stepper.model.train()
    for batch, plan in zip(batches, plans, strict=True):
        lr = learning_rate(config.train, step=state.step, steps_per_epoch=steps_per_epoch)
        report = stepper.step([next(shares) for _ in plan], cases=len(batch), lr=lr, stop=stop_requested())
        move_average(snapshot, config.train.ema)
        state.step += 1
        state.samples_seen += len(batch)
        state.loss_sum += report.loss * len(batch)
        state.loss_scale = runtime.loss_scale
        checkpoints.save(state, snapshot, now=report.stop)
        if report.stop:
            raise RequeueError(
                f"Stopped at epoch {state.epoch}, step {state.step}; the state is in {job.folder}.",
                "The same command goes on from there.",
            )
    return learning_rate(config.train, step=state.step - 1, steps_per_epoch=steps_per_epoch)


def _shares(
    runtime: Runtime,
    job: FoldJob,
    epoch: int,
    batches: Sequence[np.ndarray],
    earlier: Sequence[np.ndarray],
    plans: Sequence[Sequence[MicroBatch]],
) -> Iterator[Share]:
    """This process's shares of all global batches, one after the other, read ahead."""
    passes = [(step, micro) for step, plan in enumerate(plans) for micro in plan]
    bags = [batches[step][list(micro.indices)].tolist() for step, micro in passes]
    targets = targets_of(job, job.train)
    stream = job.train.loader.stream(bags, epoch=epoch, training=True)
    for (step, micro), indices, batch in zip(passes, bags, stream, strict=True):
        chosen = torch.as_tensor(indices)
        own = Targets(targets.label[chosen], targets.event[chosen], targets.time_months[chosen])
        weights = torch.tensor(micro.weights, dtype=runtime.dtype, device=runtime.device)
        keys = [job.train.bags[i].key for i in indices]
        seed = dropout_seed(job.name, epoch, keys, earlier[step][list(micro.indices)].tolist())
        yield Share(batch, own.to(runtime.device), weights, seed)


def out_of_patience(state: TrainState, patience: int | None) -> bool:
    """Whether so many epochs have passed without a better validation score."""
    return patience is not None and state.best_score is not None and state.epoch - 1 - state.best_epoch >= patience


def is_best(state: TrainState, metrics: dict[str, float], job: FoldJob) -> bool:
    """Whether the epoch that `state` stands in is the best so far; where nothing chooses, the latest is.

    Its score is noted in `state`.

    Raises:
        DataError: The score is not finite.
    """
    train = job.config.train
    if job.validation is None:
        score = float(state.epoch)
    else:
        score = metrics["validation_cindex"] if train.monitor == "cindex" else -metrics["validation_loss"]
    if not math.isfinite(score):
        raise DataError(
            f"The validation score of epoch {state.epoch} is not finite.", "Lower train.lr.", topic="not-finite"
        )
    if state.epoch < train.min_epoch or (state.best_score is not None and score <= state.best_score):
        return False
    state.best_score, state.best_epoch = score, state.epoch
    return True


def move_average(snapshot: Snapshot, decay: float | None) -> None:
    """Move the average towards the parameters, where there is one."""
    if decay is None:
        return
    for name, part in snapshot.parts.items():
        snapshot.average[name].lerp_(part.values, 1 - decay)


@contextlib.contextmanager
def _averaged(runtime: Runtime, model: nn.Module, snapshot: Snapshot) -> Iterator[None]:
    """Evaluate with the moving average of the parameters, where there is one."""
    if not snapshot.average:
        yield
        return
    trained = snapshot.parameters()
    snapshot.put(snapshot.average)
    runtime.publish(model, snapshot.parts)
    yield
    snapshot.put(trained)
    runtime.publish(model, snapshot.parts)
