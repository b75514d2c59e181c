"""One optimizer step over a global batch, for any number of processes.

The loss is the mean over the *global* number of cases, so a step is the same on 1 process or 64, and a smaller last
batch is weighted by its size. Losses stay on the device until the step reads them all at once: on a GPU, the host waits
for it once a step. Losses over sets of cases (Cox, ranking) need the logits of the complete global batch: a
first pass without gradients gathers them from all ranks, and a second pass sends their gradient through the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfusion.errors import DataError
from cfusion.files import digest_json
from cfusion.models.dropout import seeded
from cfusion.survival.losses import Loss
from cfusion.training.runtime import Runtime
from cfusion.types import BagBatch, SurvivalOutput, Targets


@dataclass(frozen=True)
class Share:
    """A process's share of a global batch, for one forward pass.

    Attributes:
        batch: The bags.
        targets: Their outcomes.
        weights: [bag], 1, or 0 for a bag that only keeps this rank in step with the others.
        seed: Dropout seed of the pass, see `dropout_seed`.
    """

    batch: BagBatch
    targets: Targets
    weights: Tensor
    seed: int


class ComingShares(Collection[Share]):
    """The shares of one step, taken from a stream as they are needed; they can be iterated once.

    Args:
        stream: Shares of this step and later ones, in order.
        count: How many of them are this step's.
    """

    def __init__(self, stream: Iterator[Share], count: int) -> None:
        self._coming, self._count = itertools.islice(stream, count), count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Share]:
        return self._coming

    def __contains__(self, share: object) -> bool:
        raise TypeError("shares are read only once, in order")


def dropout_seed(training: str, epoch: int, keys: Sequence[str], earlier: Sequence[int]) -> int:
    """Compute the dropout seed of one forward pass in training.

    It depends only on the training run, the epoch and the bags. Masks are therefore the same for any order of bags, on
    any rank, and after a resume.

    Args:
        training: Name of the run: its seed and fold.
        epoch: From 0.
        keys: The bags of the pass, in order.
        earlier: How often each bag was drawn before in this epoch, so that a repeated bag gets different masks.
    """
    return int(digest_json([training, epoch, list(keys), list(earlier)])[:15], 16)


@dataclass(frozen=True)
class StepReport:
    """Result of a step, the same on every process.

    Attributes:
        loss: Mean loss over the global batch.
        stop: Whether any process was asked to stop.
    """

    loss: float
    stop: bool


@dataclass(frozen=True)
class Stepper:
    """A model with its optimizer and loss, ready to step.

    Attributes:
        runtime: The processes.
        model: As returned by `Runtime.prepare`.
        optimizer: As returned by `Runtime.prepare`.
        loss: From the loss registry.
        alpha: Weight of uncensored cases in the loss.
        clip_norm: Maximum gradient norm; None: no clipping.
        published_errors: Whether a GPU computes the forward pass as in the published program, see `Runtime.autocast`.
    """

    runtime: Runtime
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    alpha: float
    clip_norm: float | None
    published_errors: bool = False

    def step(self, micro_batches: Collection[Share], *, cases: int, lr: float, stop: bool = False) -> StepReport:
        """Update the parameters with the gradient of the mean loss over the global batch.

        Args:
            micro_batches: This process's share; every rank has the same number.
            cases: Bags of the global batch over all processes.
            lr: Learning rate of this step.
            stop: Whether this process wants to stop after the step.

        Raises:
            DataError: The loss or its gradient is not finite on some rank; the bags are named, no parameter changed.
        """
        loss, bags = self._accumulate(micro_batches, cases)
        return self.move(loss, bags, cases=cases, lr=lr, stop=stop)

    def carry(self, micro_batches: Collection[Share], *, cases: int, window: int, stop: bool = False) -> StepReport:
        """Add the gradient of a partial window to the next step's, as the published program does at an epoch's end.

        Args:
            micro_batches: This process's share; every rank has the same number.
            cases: Bags of the partial window over all processes.
            window: Bags of a complete window, by which the gradient is divided.
            stop: Whether this process wants to stop after it.

        Raises:
            DataError: The loss is not finite on some rank; the bags are named.
        """
        loss, bags = self._accumulate(micro_batches, window)
        report, _ = self._agree(loss, bags, cases=cases, stop=stop)
        return report

    def accumulate(self, micro_batches: Collection[Share], *, cases: int) -> Tensor:
        """Add the gradient of this process's share of a global batch of `cases` bags; the last pass exchanges it.

        Returns:
            Sum of the loss over the share, before division by `cases`: f64, on the device.
        """
        return self._accumulate(micro_batches, cases)[0]

    def _accumulate(self, micro_batches: Collection[Share], cases: int) -> tuple[Tensor, list[str]]:
        """Do so, and list the patients; each share is taken from `micro_batches` when its pass begins."""
        surrogates = None
        if self.loss.set_wise:
            micro_batches = list(micro_batches)
            surrogates = self._set_wise_gradients(micro_batches)
        with self.runtime.held_casts(published=self.published_errors):
            return self._passes(micro_batches, surrogates, cases)

    def _passes(
        self, micro_batches: Collection[Share], surrogates: _SetWise | None, cases: int
    ) -> tuple[Tensor, list[str]]:
        """Run forward and backward of each share; return the sum of the loss, and the patients."""
        local_loss, bags = torch.zeros((), dtype=torch.float64, device=self.runtime.device), list[str]()
        for number, micro in enumerate(micro_batches):
            bags += micro.batch.case_ids
            with self.runtime.accumulate(self.model, last=number == len(micro_batches) - 1):
                output = self._forward(micro)
                if surrogates is None:
                    loss = (self.loss(output, micro.targets, alpha=self.alpha) * micro.weights).sum()
                    local_loss += loss.detach()
                else:
                    loss = (_heads(output) * surrogates.gradients[number]).sum()
                    if output.penalty is not None:
                        penalty = (output.penalty * micro.weights).sum()
                        loss, local_loss = loss + penalty, local_loss + penalty.detach()
                self.runtime.backward(loss * (self.runtime.world_size / cases))
        if surrogates is not None:
            local_loss += surrogates.loss / self.runtime.world_size
        return local_loss, bags

    def move(self, loss: Tensor, bags: Sequence[str], *, cases: int, lr: float, stop: bool = False) -> StepReport:
        """Update the parameters with the accumulated gradient.

        Args:
            loss: Return value of `accumulate`, summed over a global batch.
            bags: Patients of this process's share.
            cases: See `step`.
            lr: See `step`.
            stop: See `step`.

        Raises:
            DataError: See `step`.
        """
        norm = self.runtime.clip(self.model, self.clip_norm)
        report, finite = self._agree(loss, bags, cases=cases, stop=stop, norm=norm)
        if not self.runtime.advance(self.optimizer, lr=lr, clip_norm=self.clip_norm, finite=finite):
            self._refuse(bags, "gradient")
        return report

    def _agree(
        self, loss: Tensor, bags: Sequence[str], *, cases: int, stop: bool, norm: Tensor | None = None
    ) -> tuple[StepReport, bool]:
        """Sum losses and requests to stop over all processes, and refuse a loss that is not finite.

        Returns:
            The report, and whether the gradient's norm is finite on all processes.
        """
        asked = torch.full_like(loss, float(stop))
        no_gradient = torch.zeros_like(loss) if norm is None else (~norm.isfinite()).to(loss.dtype)
        values = torch.stack([loss, (~loss.isfinite()).to(loss.dtype), asked, no_gradient])
        total, bad, stops, worse = self.runtime.sum(values)
        if bad:
            self._refuse(bags, "loss")
        return StepReport(total / cases, bool(stops)), not worse

    def _forward(self, micro: Share) -> SurvivalOutput:
        # Both passes of a set-wise loss use this method: same dropout, same arithmetic, same logits.
        with seeded(micro.seed, self.runtime.device), self.runtime.autocast(published=self.published_errors):
            return self.model(micro.batch)

    def _refuse(self, bags: Sequence[str], what: str) -> None:
        cases = self.runtime.gather(list(bags))
        raise DataError(
            f"The {what} of a step is not finite. Bags of the step: {', '.join(dict.fromkeys(cases))}.",
            "Look for NaN or huge values in their embeddings (cfusion preprocess verify), or lower train.lr.",
            topic="not-finite",
        )

    def _set_wise_gradients(self, micro_batches: Sequence[Share]) -> _SetWise:
        """Compute the gradient of a set-wise loss with respect to the logits of each local micro-batch."""
        device = self.runtime.device
        with torch.no_grad():
            local = [_heads(self._forward(micro)).double().cpu() for micro in micro_batches]
        rows = [
            (
                heads[i],
                micro.targets.label[i].item(),
                micro.targets.event[i].item(),
                micro.targets.time_months[i].item(),
                None if micro.targets.stratum is None else micro.targets.stratum[i].item(),
            )
            for micro, heads in zip(micro_batches, local, strict=True)
            for i in torch.nonzero(micro.weights).flatten().tolist()
        ]
        counts = self.runtime.gather([len(rows)])
        everyone = self.runtime.gather(rows)
        heads = torch.stack([row[0] for row in everyone]).requires_grad_()
        targets = Targets(
            torch.tensor([row[1] for row in everyone]),
            torch.tensor([row[2] for row in everyone], dtype=torch.bool),
            torch.tensor([row[3] for row in everyone], dtype=torch.float64),
            None if everyone[0][4] is None else torch.tensor([row[4] for row in everyone]),
        )
        losses = [self.loss.over_logits(logits, targets, alpha=self.alpha).sum() for logits in heads.unbind(dim=1)]
        loss = torch.stack(losses).mean()
        (gradient,) = torch.autograd.grad(loss, heads)
        mine = iter(gradient[sum(counts[: self.runtime.rank]) :])
        gradients = []
        for micro, own in zip(micro_batches, local, strict=True):
            kept = [next(mine) if weight > 0 else torch.zeros(own.shape[1:]) for weight in micro.weights]
            gradients.append(torch.stack(kept).to(device=device, dtype=self.runtime.dtype))
        return _SetWise(loss.item(), gradients)


def _heads(output: SurvivalOutput) -> Tensor:
    """Return all logits that enter the loss, [bag, head, bin]."""
    return torch.stack(output.heads, dim=1)


@dataclass(frozen=True)
class _SetWise:
    loss: float
    gradients: list[Tensor]
