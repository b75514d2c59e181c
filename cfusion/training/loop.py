"""The epoch loop: train, validate, keep the best, stop early, save, resume."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from cfusion.data.partition import MicroBatch, distribute, earlier_draws, epoch_order, global_batches
from cfusion.errors import RequeueError
from cfusion.interruption import stop_requested
from cfusion.training.checkpoint import Checkpoints, TrainState
from cfusion.training.choice import chosen_parameters, finish_epoch, has_ended, validation_scores
from cfusion.training.fold_job import FoldJob, targets_of
from cfusion.training.inference import predict_logits
from cfusion.training.runtime import Runtime
from cfusion.training.schedule import learning_rate, steps_in_epoch
from cfusion.training.snapshot import Snapshot
from cfusion.training.step import ComingShares, Share, Stepper, StepReport, dropout_seed
from cfusion.types import Targets


def train_fold(runtime: Runtime, job: FoldJob, model: nn.Module, stepper: Stepper) -> tuple[TrainState, Snapshot]:
    """Train up to the maximum epochs or the patience; afterwards `model` holds the chosen parameters.

    Args:
        runtime: The processes.
        job: The training job.
        model: The bare model, whose parameters `stepper` updates.
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
    checkpoints = Checkpoints(
        job.folder, job.identity, runtime, keep=train.keep_checkpoints, card=job.card,
        background=train.background_checkpoints,
    )  # fmt: skip
    state = checkpoints.load(snapshot) or TrainState()
    runtime.loss_scale = state.loss_scale
    runtime.publish(model, snapshot.parts)
    for name, gradient in snapshot.carried.items():
        model.get_parameter(name).grad = gradient
    with checkpoints.settling():
        while not has_ended(state, train):
            started = time.monotonic()
            lr = _train_epoch(runtime, job, model, state, snapshot, stepper, checkpoints)
            metrics = {"train_loss": state.loss_sum / state.samples_seen, "learning_rate": lr}
            with _averaged(runtime, model, snapshot):
                metrics |= _validated(runtime, job, model, state.epoch)
                finish_epoch(job, state, snapshot, metrics, snapshot.parameters)
            if runtime.is_main:
                job.on_epoch(state.epoch - 1, {**metrics, "epoch_seconds": time.monotonic() - started})
    snapshot.put(chosen_parameters(state, snapshot, train))
    runtime.publish(model, snapshot.parts)
    return state, snapshot


def _validated(runtime: Runtime, job: FoldJob, model: nn.Module, epoch: int) -> dict[str, float]:
    """Return the scores of the patients who choose the epoch; none if there are no such patients."""
    if job.validation is None:
        return {}
    train, published = job.config.train, job.evaluation(epoch)
    logits = predict_logits(runtime, model, job.validation, train.micro_batch, published, packed=train.packed)
    return validation_scores(job, job.validation, logits)


def _train_epoch(
    runtime: Runtime,
    job: FoldJob,
    model: nn.Module,
    state: TrainState,
    snapshot: Snapshot,
    stepper: Stepper,
    checkpoints: Checkpoints,
) -> float:
    """Train the rest of the current epoch; return the last learning rate."""
    config, costs, lengths = job.config, job.train.costs, job.train.lengths
    order = epoch_order(
        [bag.key for bag in job.train.bags],
        seed=config.data.order_seed,
        epoch=state.epoch,
        weights=job.sampling_weights,
    )
    steps_per_epoch = steps_in_epoch(config, len(order))
    batches = global_batches(order[state.samples_seen :], config.parallel.global_batch)
    earlier = global_batches(earlier_draws(order)[state.samples_seen :], config.parallel.global_batch)
    plans = [
        distribute(
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
        own, stop = ComingShares(shares, len(plan)), stop_requested() or job.stop()
        if config.train.published_errors and len(batch) < config.parallel.global_batch:
            report = _carry(job, model, snapshot, stepper, own, cases=len(batch), stop=stop)
        else:
            lr = learning_rate(config.train, step=state.step, steps_per_epoch=steps_per_epoch)
            report = stepper.step(own, cases=len(batch), lr=lr, stop=stop)
            snapshot.carried = {}
            snapshot.move_average(config.train.ema)
            state.step += 1
        state.samples_seen += len(batch)
        state.loss_sum += report.loss * len(batch)
        state.loss_scale = runtime.loss_scale
        checkpoints.save(state, snapshot, now=report.stop)
        if report.stop:
            raise RequeueError(
                f"Stopped at epoch {state.epoch}, step {state.step}; the state is in {job.folder}.",
                "Run the same command again to resume.",
            )
    return learning_rate(config.train, step=state.step - 1, steps_per_epoch=steps_per_epoch)


def _carry(
    job: FoldJob,
    model: nn.Module,
    snapshot: Snapshot,
    stepper: Stepper,
    own: Collection[Share],
    *,
    cases: int,
    stop: bool,
) -> StepReport:
    """Keep the gradient of an epoch's last, partial window for the next epoch (`train.published_errors`)."""
    window = job.config.parallel.global_batch
    report = stepper.carry(own, cases=cases, window=window, stop=stop)
    snapshot.carried = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return report


def _shares(
    runtime: Runtime,
    job: FoldJob,
    epoch: int,
    batches: Sequence[np.ndarray],
    earlier: Sequence[np.ndarray],
    plans: Sequence[Sequence[MicroBatch]],
) -> Iterator[Share]:
    """Yield this process's shares of all global batches in order, read ahead.

    Outcomes and weights of the epoch are moved to the device once: a copy for each share would wait for the GPU.
    """
    passes = [(step, micro) for step, plan in enumerate(plans) for micro in plan]
    bags = [batches[step][list(micro.indices)].tolist() for step, micro in passes]
    targets = _rows(targets_of(job, job.train), bags, runtime.device)
    weights = torch.tensor([w for _, micro in passes for w in micro.weights], dtype=runtime.dtype).to(runtime.device)
    loader = job.train.loader
    read = loader.packed if job.config.train.packed else loader.stream
    stream = read(bags, epoch=epoch, training=True)
    each = zip(passes, bags, targets, weights.split([len(indices) for indices in bags]), stream, strict=True)
    for (step, micro), indices, own, weight, batch in each:
        keys = [job.train.bags[i].key for i in indices]
        seed = dropout_seed(job.name, epoch, keys, earlier[step][list(micro.indices)].tolist())
        yield Share(batch, own, weight, seed)


def _rows(targets: Targets, bags: Sequence[Sequence[int]], device: torch.device) -> list[Targets]:
    """Return the outcomes of the bags of each pass, on the device."""
    rows, sizes = torch.tensor([i for indices in bags for i in indices]), [len(indices) for indices in bags]
    drawn = targets.of(rows).to(device)
    return [drawn.of(slice(end - size, end)) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


@contextlib.contextmanager
def _averaged(runtime: Runtime, model: nn.Module, snapshot: Snapshot) -> Iterator[None]:
    """Evaluate with the moving average of the parameters, if there is one."""
    if not snapshot.average:
        yield
        return
    trained = snapshot.parameters()
    snapshot.put(snapshot.average)
    runtime.publish(model, snapshot.parts)
    yield
    snapshot.put(trained)
    runtime.publish(model, snapshot.parts)
