import itertools
import math

import pytest
import torch

from cfusion.config import TrainConfig
from cfusion.recipe import PUBLISHED_RECIPE
from cfusion.training.schedule import learning_rate

STEPS_PER_EPOCH = 7


def rates(train: TrainConfig) -> list[float]:
    total = train.epochs * STEPS_PER_EPOCH
    return [learning_rate(train, step=step, steps_per_epoch=STEPS_PER_EPOCH) for step in range(total)]


def test_cosine_rises_to_the_peak_and_falls_to_the_floor():
    train = TrainConfig(epochs=10, lr=1.0, warmup_fraction=0.1, final_lr=0.05)
    values = rates(train)
    assert values[:7] == pytest.approx([(k + 1) / 7 for k in range(7)])
    assert max(values) == 1.0
    assert values[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(values[7:]))


def test_constant_stays_after_the_warmup():
    assert set(rates(TrainConfig(schedule="constant", lr=0.5, warmup_fraction=0.0))) == {0.5}


def test_published_schedule_is_torch_cosine_annealing_stepped_by_epoch():
    train = TrainConfig(recipe="published", **PUBLISHED_RECIPE)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=train.lr)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    values = rates(train)
    for epoch in range(25):
        assert values[epoch * STEPS_PER_EPOCH] == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()
    assert math.isclose(values[10 * STEPS_PER_EPOCH], 0.0, abs_tol=1e-12), "epoch 10 of the published schedule is idle"
