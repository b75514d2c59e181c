"""Computes predictions of a model for bags, one row per patient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from cfusion.data.loader import BagSet
from cfusion.data.partition import evaluation_slices
from cfusion.models.attention import keep_attention_dropout
from cfusion.models.dropout import seeded
from cfusion.survival.bins import TimeBins
from cfusion.survival.predictions import curve_table
from cfusion.training.runtime import Runtime
from cfusion.training.step import dropout_seed
from cfusion.types import SurvivalOutput


@dataclass(frozen=True)
class PublishedEvaluation:
    """Evaluation with the errors of the published program: attention dropout stays on, and a GPU computes in fp16.

    The dropout masks of a bag follow from these values and the bag, so that each evaluation of an epoch gives the same
    numbers, after a resume too.

    Attributes:
        training: Name of the training run: its seed and fold.
        epoch: The epoch whose parameters are evaluated.
    """

    training: str
    epoch: int

    @contextlib.contextmanager
    def forward(self, runtime: Runtime, keys: Sequence[str]) -> Iterator[None]:
        """Run one forward pass over the bags `keys`."""
        seed = dropout_seed(f"evaluation of {self.training}", self.epoch, keys, [0] * len(keys))
        with seeded(seed, runtime.device), runtime.autocast(published=True):
            yield


def predict_logits(
    runtime: Runtime,
    model: nn.Module,
    bags: BagSet,
    micro_batch: int,
    published: PublishedEvaluation | None = None,
    *,
    packed: bool = False,
) -> Tensor:
    """Return logits [bag, bin] in f64 of every bag, each computed once, the same on every rank.

    Dropout is off, unless the model is evaluated as in the published program (`published`). The forward pass computes
    in `parallel.precision`, as in training. `packed`: the bags of a pass are joined without padding.
    """
    mine = evaluation_slices(bags.costs, runtime.world_size)[runtime.rank]
    slices = [mine[start : start + micro_batch].tolist() for start in range(0, len(mine), micro_batch)]
    own = len(slices)
    if runtime.sharded_forward:
        # Every pass needs all processes; one with fewer bags repeats its cheapest bag and drops the result.
        slices += [[int(bags.costs.argmin())]] * (max(runtime.gather([own])) - own)
    was_training = model.training
    model.eval()
    if published is not None:
        keep_attention_dropout(model)
    found: list[Tensor] = []
    with torch.no_grad():
        read = bags.loader.packed if packed else bags.loader.stream
        stream = read(slices, epoch=0, training=False)
        for number, (indices, batch) in enumerate(zip(slices, stream, strict=True)):
            keys = [bags.bags[i].key for i in indices]
            with runtime.autocast() if published is None else published.forward(runtime, keys):
                output: SurvivalOutput = model(batch)
            if number < own:
                found.append(output.logits.double())
    model.train(was_training)
    # Read from the device once: reading each bag's logits would wait for the GPU between bags.
    logits = torch.cat(found).tolist() if found else []
    gathered = dict(runtime.gather(list(zip((i for indices in slices[:own] for i in indices), logits, strict=True))))
    return torch.tensor([gathered[i] for i in range(len(bags))], dtype=torch.float64)


def patient_survival(logits: Tensor, bags: BagSet) -> pd.DataFrame:
    """Return survival past each time bin, columns 0 … K − 1, one row per patient in the order of the bags.

    If a patient has several bags, their curves are averaged, and therefore their risks.
    """
    survival = pd.DataFrame(SurvivalOutput.from_logits(logits).survival.numpy())
    return survival.groupby([bag.case_id for bag in bags.bags], sort=False).mean()


def prediction_frame(logits: Tensor, bags: BagSet, bins: TimeBins) -> pd.DataFrame:
    """Return one row per patient: `case_id, risk, survival_1…K, edge_1…K` (right edges of the time bins, in months)."""
    survival = patient_survival(logits, bags)
    return curve_table(list(survival.index), survival.to_numpy(), bins.right_edges_months)
