"""Losses compared with the published program, independent implementations, closed forms and finite differences."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter

from cfusion.survival.losses import LOSSES, Loss, cox, log_risk, ranking
from cfusion.types import SurvivalOutput, Targets


def cases(seed: int, count: int, bins: int = 4) -> tuple[torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, bins, generator=generator, dtype=torch.float64)
    # Times in whole numbers, so that there are ties.
    time = torch.randint(0, max(2, count // 2), (count,), generator=generator).double()
    label = torch.randint(0, bins, (count,), generator=generator)
    return logits, Targets(label, torch.rand(count, generator=generator) < 0.6, time)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("name", ["nll", "ce"])
def test_published_values(material: Path, name: str, alpha: float):
    golden = json.loads((material / "golden" / "losses.json").read_text())
    logits = torch.tensor(golden["hazards"], dtype=torch.float64).logit()
    event = torch.tensor(golden["censorship"]) == 0
    targets = Targets(torch.tensor(golden["label"]), event, torch.ones(len(event)))
    loss = LOSSES[name](SurvivalOutput.from_logits(logits), targets, alpha=alpha).mean()
    assert loss.item() == pytest.approx(golden["loss"][f"{name}_alpha{alpha}"], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_nll_and_ce_match_their_formulas(alpha: float):
    logits, targets = cases(1, 60)
    output = SurvivalOutput.from_logits(logits)
    row = torch.arange(60)
    before = torch.nn.functional.pad(output.survival, (1, 0), value=1.0)[row, targets.label]
    at, hazard = output.survival[row, targets.label], output.hazards[row, targets.label]
    likelihood = -(before * hazard).log()
    nll = torch.where(targets.event, likelihood, -(1 - alpha) * at.log())
    torch.testing.assert_close(LOSSES["nll"](output, targets, alpha=alpha), nll)
    ce = torch.where(targets.event, (1 - alpha) * -(1 - at).log() + alpha * likelihood, (1 - alpha) * -at.log())
    torch.testing.assert_close(LOSSES["ce"](output, targets, alpha=alpha), ce)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_saturated_logits_give_finite_losses_and_gradients(name: str, size: float, dtype: torch.dtype):
    signs = torch.tensor([[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1], [-1, -1, -1, 1]])
    logits = (signs.repeat(8, 1) * size).to(dtype).requires_grad_()
    label = torch.arange(4).repeat_interleave(4).repeat(2)
    targets = Targets(label, torch.arange(32) < 16, torch.arange(32) % 5 + 1.0)
    loss = LOSSES[name].over_logits(logits, targets, alpha=0.2)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name: str, alpha: float):
    logits, targets = cases(2, 14)
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name].over_logits(x, targets, alpha=alpha).sum(), logits.requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name].over_logits(20 * x, targets, alpha=alpha).sum(), logits, atol=1e-4
    )


def efron(eta: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    """Compute the negative log partial likelihood directly from the formula."""
    total = 0.0
    for t in np.unique(time[event]):
        dead, at_risk = event & (time == t), time >= t
        for share in np.arange(dead.sum()) / dead.sum():
            total += math.log(np.exp(eta[at_risk]).sum() - share * np.exp(eta[dead]).sum())
        total -= eta[dead].sum()
    return total


@settings(deadline=None, max_examples=60, database=None)
@given(st.integers(0, 10_000), st.integers(1, 25))
def test_cox_is_the_partial_likelihood_with_efrons_ties(seed: int, count: int):
    _, targets = cases(seed, count)
    eta = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    terms = cox(eta, targets.time_months, targets.event)
    expected = efron(eta.numpy(), targets.time_months.numpy(), targets.event.numpy())
    assert terms.sum().item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert not terms[~targets.event].any()
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    again = cox(eta[shuffle], targets.time_months[shuffle], targets.event[shuffle])
    assert again.sum().item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_cox_is_the_likelihood_that_lifelines_maximises():
    generator = np.random.default_rng(3)
    frame = pd.DataFrame({"x": generator.normal(size=80), "time": generator.integers(1, 20, 80).astype(float)})
    frame["event"] = generator.random(80) < 0.7
    fitted = CoxPHFitter().fit(frame, "time", "event")
    slope = torch.tensor(fitted.params_["x"], dtype=torch.float64, requires_grad=True)
    eta = slope * torch.tensor(frame["x"].to_numpy())
    loss = cox(eta, torch.tensor(frame["time"].to_numpy()), torch.tensor(frame["event"].to_numpy())).sum()
    assert loss.item() == pytest.approx(-fitted.log_likelihood_, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, slope)
    assert abs(gradient.item()) < 1e-4


@settings(deadline=None, max_examples=40, database=None)
@given(st.integers(0, 10_000), st.integers(2, 25))
def test_ranking_bounds_the_share_of_wrong_pairs(seed: int, count: int):
    _, targets = cases(seed, count)
    eta = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    terms = ranking(eta, targets.time_months, targets.event)
    time, event = targets.time_months, targets.event
    for i in range(count):
        others = [j for j in range(count) if event[i] and (time[j] > time[i] or (time[j] == time[i] and not event[j]))]
        expected = np.mean([math.log2(1 + math.exp(eta[j] - eta[i])) for j in others]) if others else 0.0
        wrong = np.mean([float(eta[j] > eta[i]) for j in others]) if others else 0.0
        assert terms[i].item() == pytest.approx(expected, rel=1e-9)
        assert terms[i].item() >= wrong


def test_log_risk_is_the_cumulative_hazard_and_rises_with_every_logit():
    logits, _ = cases(4, 10)
    output = SurvivalOutput.from_logits(logits)
    torch.testing.assert_close(log_risk(logits), (-output.survival[:, -1].log()).log())
    jacobian = torch.autograd.functional.jacobian(lambda x: log_risk(x).sum(), logits)
    assert (jacobian > 0).all()


@pytest.mark.parametrize("name", ["cox", "ranking"])
def test_set_wise_losses_prefer_the_right_order(name: str):
    time, event = torch.arange(1.0, 9.0), torch.tensor([True] * 6 + [False] * 2)
    targets = Targets(torch.zeros(8, dtype=torch.long), event, time)
    right = torch.linspace(2, -2, 8)[:, None].expand(8, 4)
    losses = [LOSSES[name].over_logits(logits, targets).sum() for logits in (right, -right)]
    assert losses[0] < losses[1]
    assert LOSSES[name].set_wise


def test_instance_logits_share_the_loss():
    logits, targets = cases(5, 6)
    other, _ = cases(6, 6)
    output = SurvivalOutput.from_logits(logits)
    both = SurvivalOutput(output.logits, output.hazards, output.survival, output.risk, other)
    loss: Loss = LOSSES["nll"]
    expected = (loss.over_logits(logits, targets) + loss.over_logits(other, targets)) / 2
    torch.testing.assert_close(loss(both, targets), expected)
    assert not loss.set_wise
