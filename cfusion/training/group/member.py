"""One member of a group: what it trains on in each pass, when it steps, and how its epoch is chosen.

The validation bags of an epoch are read in the next pass and evaluated with a copy of the parameters at the epoch's
end. Whether training should have stopped is therefore known one pass late; later training is then discarded.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfusion.data.batches import join, pack
from cfusion.data.loader import BagSet
from cfusion.survival.losses import LOSSES
from cfusion.training.checkpoint import TrainState
from cfusion.training.choice import chosen_parameters, finish_epoch, has_ended, validation_scores
from cfusion.training.fold_job import targets_of
from cfusion.training.folds import FoldRun, ReadyFold, fold_run
from cfusion.training.group.order import Window, windows
from cfusion.training.optimizers import make_optimizer
from cfusion.training.runtime import Runtime
from cfusion.training.schedule import learning_rate, steps_in_epoch
from cfusion.training.snapshot import Snapshot
from cfusion.training.step import Share, Stepper, dropout_seed
from cfusion.types import BagBatch, SurvivalOutput, Targets


@dataclass(frozen=True)
class Visit:
    """A bag of a pass, as handed to all members.

    Attributes:
        seen: Number of bags of the order processed after it.
        bag: Its number.
        learnt: The bag as sampled for training; None if no member of this rank trains on it.
        shown: The unchanged bag; None if no member of this rank validates or predicts with it.
    """

    seen: int
    bag: int
    learnt: BagBatch | None
    shown: BagBatch | None


class GroupMember:
    """A fold that is trained together with others.

    Attributes:
        fold: The fold.
        chosen: Whether its parameters are chosen; then its bags are predicted, which is the last pass.
        position: Position of its training.
        verdict: State after the last validated epoch, with the best epoch.
    """

    def __init__(self, runtime: Runtime, fold: ReadyFold, all_bags: BagSet) -> None:
        train, numbers = fold.job.config.train, {bag.key: number for number, bag in enumerate(all_bags.bags)}
        self.fold = fold
        self.chosen = False
        self.position, self.verdict = TrainState(), TrainState()
        self._runtime = runtime
        self._all_bags = all_bags
        network = fold.network.to(device=runtime.device, dtype=runtime.dtype).train()
        optimizer = make_optimizer(network, train)
        self._stepper = Stepper(runtime, network, optimizer, LOSSES[train.loss], train.alpha, train.clip_norm)
        self._evaluated = copy.deepcopy(network).eval()
        self._snapshot = Snapshot(runtime.parts(network, optimizer))
        if train.ema:
            self._snapshot.average = self._snapshot.parameters()
        sets = {"train": fold.job.train, "validation": fold.job.validation, "test": fold.test}
        self._numbers = {name: [numbers[bag.key] for bag in bags.bags] for name, bags in sets.items() if bags}
        targets = targets_of(fold.job, fold.job.train)
        self._targets = {number: i for i, number in enumerate(self._numbers["train"])}
        self._outcomes = targets.to(runtime.device)
        # Metrics of the epoch that is being validated; None if there is none.
        self._validating: dict[str, float] | None = None
        # Duration of the pass that trained it.
        self._seconds = 0.0
        # Logits of evaluated bags, f64 on the device until all are needed: reading one would wait for the GPU.
        self._logits: dict[int, Tensor] = {}
        self._shown: frozenset[int] = frozenset()
        self._windows: deque[Window] = deque()
        self._passes: dict[int, tuple[int, ...]] = {}
        self._held: dict[int, BagBatch] = {}
        self._loss = self._no_loss()

    @property
    def learns(self) -> Collection[int]:
        """Bags that it trains on in this pass."""
        going_on = not self.chosen and self.position.epoch < self.fold.job.config.train.epochs
        return self._targets.keys() if going_on else ()

    @property
    def shown(self) -> Collection[int]:
        """Bags that its parameter copy evaluates in this pass."""
        if self.chosen:
            return {*self._numbers["train"], *self._numbers["test"]}
        return self._numbers["validation"] if self._validating is not None else ()

    def begin(self, order: np.ndarray, mine: Collection[int]) -> None:
        """Plan the rest of a pass.

        Args:
            order: Bags of the pass.
            mine: Bags that this rank reads.
        """
        config = self.fold.job.config
        planned = windows(
            order, self.learns, mine, self._all_bags.costs, self._all_bags.lengths,
            global_batch=config.parallel.global_batch, micro_batch=config.train.micro_batch,
            token_budget=config.data.token_budget,
        )  # fmt: skip
        self._windows = deque(planned[math.ceil(self.position.samples_seen / config.parallel.global_batch) :])
        self._passes = {bag: bags for window in self._windows for bags in window.passes for bag in bags}
        self._shown = frozenset(self.shown)
        self._held.clear()
        self._loss = self._no_loss()

    def wants(self, bag: int) -> bool:
        """Whether this rank needs a bag for training."""
        return bag in self._passes

    def misses(self, bag: int) -> bool:
        """Whether the parameter copy still has to evaluate a bag."""
        return bag in self._shown and bag not in self._logits

    def visit(self, visit: Visit) -> None:
        """Train on a bag, evaluate it, and step after the last bag of a global batch. Every rank must call this.

        Raises:
            DataError: The loss or its gradient is not finite; the message names the bags.
        """
        if visit.learnt is not None and self.wants(visit.bag):
            self._learn(visit.bag, visit.learnt)
        if visit.shown is not None and self.misses(visit.bag):
            self._show(visit.bag, visit.shown)
        if self._windows and self._windows[0].end == visit.seen:
            self._step()

    def _learn(self, bag: int, batch: BagBatch) -> None:
        """Add a bag; the forward pass runs with its last bag, or, for set-wise losses, when all bags have arrived."""
        self._held[bag] = batch
        bags = self._passes.pop(bag)
        if self._stepper.loss.set_wise or not all(other in self._held for other in bags):
            return
        self._loss += self._stepper.accumulate([self._share(bags)], cases=len(self._windows[0].bags))

    def _show(self, bag: int, batch: BagBatch) -> None:
        """Evaluate a bag with the parameter copy."""
        with torch.no_grad(), self._runtime.autocast():
            self.has_shown(bag, self._evaluated(batch))

    def has_shown(self, bag: int, output: SurvivalOutput) -> None:
        """Store the parameter copy's logits of a bag."""
        self._logits[bag] = output.logits[0].double()

    @property
    def model(self) -> Any:
        """The network that is trained."""
        return self._stepper.model

    @property
    def copy(self) -> Any:
        """The parameter copy."""
        return self._evaluated

    @property
    def cases(self) -> int:
        """Bags of the global batch in progress."""
        return len(self._windows[0].bags)

    def learns_one(self, visit: Visit) -> bool:
        """Whether its next forward pass in training is over this bag only."""
        return visit.learnt is not None and self._passes.get(visit.bag) == (visit.bag,)

    def shows_one(self, visit: Visit) -> bool:
        """Whether its parameter copy evaluates this bag."""
        return visit.shown is not None and self.misses(visit.bag)

    def loss_of(self, bag: int, output: SurvivalOutput) -> Tensor:
        """Return the loss of a training bag, before division by the size of the global batch."""
        row = self._targets[bag]
        targets = self._outcomes.of(slice(row, row + 1))
        return self._stepper.loss(output, targets, alpha=self._stepper.alpha).sum()

    def has_learnt(self, bag: int, loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Add the loss and the gradient of a pass over one bag, which was computed with other members'."""
        del self._passes[bag]
        self._loss += loss
        for name, parameter in self.model.named_parameters():
            gradient = gradients[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _step(self) -> None:
        job, state, window = self.fold.job, self.position, self._windows[0]
        cases = len(window.bags)
        if self._stepper.loss.set_wise:
            self._loss = self._stepper.accumulate([self._share(bags) for bags in window.passes], cases=cases)
        self._average_gradients()
        steps = steps_in_epoch(job.config, len(job.train))
        lr = learning_rate(job.config.train, step=state.step, steps_per_epoch=steps)
        own = [self._all_bags.bags[bag].case_id for bags in window.passes for bag in bags]
        report = self._stepper.move(self._loss, own, cases=cases, lr=lr)
        self._snapshot.move_average(job.config.train.ema)
        state.step += 1
        state.samples_seen += cases
        state.loss_sum += report.loss * cases
        self._windows.popleft()
        self._loss = self._no_loss()

    def conclude(self, seconds: float) -> FoldRun | None:
        """End a pass: choose by the previous epoch's validation, and start this epoch's. Every rank must call this.

        Args:
            seconds: Duration of the pass.

        Returns:
            The result, once its bags are predicted.

        Raises:
            DataError: A validation score is not finite.
            ConfigError: Training has ended and no epoch may be chosen.
        """
        trained = bool(self.learns)
        if self.shown:
            self._logits = {
                bag: torch.tensor(row, dtype=torch.float64) for bag, row in self._everyones_logits().items()
            }
        if self.chosen:
            training, scored = self._collected("train"), self._collected("test")
            return fold_run(self._runtime, self.fold, self._evaluated, self.verdict, training, scored)
        if self._validating is not None:
            self._validate(self._validating)
        if trained and not self.chosen:
            self._start_validation()
            self._seconds = seconds
            if self.fold.job.validation is None and self._validating is not None:
                self._validate(self._validating)
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors needed to resume, for reading and writing."""
        parts = self._snapshot.parts
        groups = {
            "model": {name: part.values for name, part in parts.items()},
            "average": self._snapshot.average,
            "best": self._snapshot.best,
            "evaluated": self._evaluated.state_dict(),
        }
        found = {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        for name, part in parts.items():
            found |= {f"{moment}/{name}": values for moment, values in part.moments.items()}
        return found

    def numbers(self) -> dict[str, Any]:
        """Return the rest of the state. Every rank must call this."""
        logits = self._everyones_logits()
        return {
            "position": dataclasses.asdict(self.position),
            "verdict": dataclasses.asdict(self.verdict),
            "judged": self._validating,
            "seconds": self._seconds,
            "chosen": self.chosen,
            "logits": [[self._all_bags.bags[bag].key, values] for bag, values in sorted(logits.items())],
        }

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore the state from `numbers` and `tensors`."""
        self.position, self.verdict = TrainState(**numbers["position"]), TrainState(**numbers["verdict"])
        self._validating, self.chosen = numbers["judged"], numbers["chosen"]
        self._seconds = numbers["seconds"]
        keys = {bag.key: number for number, bag in enumerate(self._all_bags.bags)}
        self._logits = {
            keys[key]: torch.tensor(values, dtype=torch.float64, device=self._runtime.device)
            for key, values in numbers["logits"]
        }
        if self.verdict.best_epoch >= 0:
            self._snapshot.best = self._snapshot.parameters()
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])

    def _share(self, bags: tuple[int, ...]) -> Share:
        # Slices, as a list of rows would be copied to the device and wait for it.
        rows = (self._targets[bag] for bag in bags)
        targets = Targets.join([self._outcomes.of(slice(row, row + 1)) for row in rows])
        keys = [self._all_bags.bags[bag].key for bag in bags]
        seed = dropout_seed(self.fold.job.name, self.position.epoch, keys, [0] * len(bags))
        weights = torch.ones(len(bags), dtype=self._runtime.dtype, device=self._runtime.device)
        joined = (pack if self.fold.job.config.train.packed else join)([self._held.pop(bag) for bag in bags])
        return Share(joined, targets, weights, seed)

    def _no_loss(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._runtime.device)

    def _everyones_logits(self) -> dict[int, list[float]]:
        """Gather the logits by bag from all ranks. Every rank must call this."""
        rows = torch.stack(list(self._logits.values())).tolist() if self._logits else []
        return dict(self._runtime.gather(list(zip(self._logits, rows, strict=True))))

    def _average_gradients(self) -> None:
        """Average gradients once per step in one exchange, as DistributedDataParallel does; without a bag add zero."""
        if self._runtime.world_size == 1:
            return
        learnt = [p for p in self._stepper.model.parameters() if p.requires_grad]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in learnt])
        torch.distributed.all_reduce(flat)
        flat /= self._runtime.world_size
        for parameter, gradient in zip(learnt, flat.split([p.numel() for p in learnt]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _start_validation(self) -> None:
        """Copy the parameters of the finished epoch for validation, and go to the next epoch."""
        config, state = self.fold.job.config, self.position
        steps = steps_in_epoch(config, len(self.fold.job.train))
        lr = learning_rate(config.train, step=state.step - 1, steps_per_epoch=steps)
        self._validating = {"train_loss": state.loss_sum / state.samples_seen, "learning_rate": lr}
        self._evaluated.load_state_dict(self._snapshot.average or self._stepper.model.state_dict())
        state.epoch, state.samples_seen, state.loss_sum = state.epoch + 1, 0, 0.0

    def _validate(self, metrics: dict[str, float]) -> None:
        job, state = self.fold.job, self.verdict
        if job.validation is not None:
            metrics = metrics | validation_scores(job, job.validation, self._collected("validation"))
        finish_epoch(job, state, self._snapshot, metrics, self._copied)
        if self._runtime.is_main:
            job.on_epoch(state.epoch - 1, {**metrics, "epoch_seconds": self._seconds})
        self._validating = None
        if has_ended(state, job.config.train):
            self._evaluated.load_state_dict(chosen_parameters(state, self._snapshot, job.config.train))
            self.chosen = True

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._evaluated.state_dict().items()}

    def _collected(self, part: str) -> Tensor:
        """Collect the logits [bag, bin] of a part's bags, and clear them."""
        return torch.stack([self._logits.pop(bag) for bag in self._numbers[part]])
