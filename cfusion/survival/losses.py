"""Losses of discrete-time survival models: likelihood, cross-entropy, Cox and ranking.

All of them take logits and compute in logarithms, so they stay finite, with useful gradients, where a hazard or a
survival probability rounds to 0 or 1. The caller sums and averages over cases, since it knows the global batch size.

Of several cohorts, each has its own baseline hazard: `nll` and `ce` take the label from the time bins of the patient's
cohort, and `cox` and `ranking` compare only patients of one cohort (strata).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from cfusion.types import SurvivalOutput, Targets, at_least_f32

LogitLoss = Callable[..., Tensor]


def nll(logits: Float[Tensor, "bag bin"], targets: Targets, *, alpha: float = 0.0) -> Float[Tensor, " bag"]:
    """Compute the negative log-likelihood of a discrete hazard model (Zadeh and Schmid, TPAMI 2020; CrossFusion, L).

    With label Y, hazards h, survival S and S_{-1} = 1: an event in bin Y gives −log S_{Y−1} − log h_Y; a case
    censored in bin Y gives −(1 − α) log S_Y. The published program clamps at 1e-7 where this computes exactly.

    Args:
        logits: Logits of the hazards.
        targets: Outcomes.
        alpha: In [0, 1]; censored cases weigh 1 − alpha.
    """
    log_hazard, log_survival = _log_terms(logits)
    before, at = _around_label(log_survival, targets.label)
    event = -before - _pick(log_hazard, targets.label)
    return torch.where(targets.event, event, -(1 - alpha) * at)


def ce(logits: Float[Tensor, "bag bin"], targets: Targets, *, alpha: float = 0.0) -> Float[Tensor, " bag"]:
    """Blend the cross-entropy of surviving past the label's bin with the likelihood (Zadeh and Schmid, TPAMI 2020).

    (1 − α) · CE + α · NLL of events, where CE is −log(1 − S_Y) for an event and −log S_Y for a censored case.

    Args:
        logits: Logits of the hazards.
        targets: Outcomes.
        alpha: In [0, 1]; weight of the events' likelihood against the cross-entropy.
    """
    log_hazard, log_survival = _log_terms(logits)
    before, at = _around_label(log_survival, targets.label)
    likelihood = -before - _pick(log_hazard, targets.label)
    event = -(1 - alpha) * _log_one_minus_exp(at) + alpha * likelihood
    return torch.where(targets.event, event, -(1 - alpha) * at)


def log_risk(logits: Float[Tensor, "bag bin"]) -> Float[Tensor, " bag"]:
    """Return the log of the cumulative hazard −log S over all bins, the predictor of a proportional-hazards model."""
    total = F.softplus(logits).sum(dim=1)
    return total.clamp_min(torch.finfo(total.dtype).tiny).log()


def cox(
    log_risks: Float[Tensor, " bag"], time: Float[Tensor, " bag"], event: Bool[Tensor, " bag"]
) -> Float[Tensor, " bag"]:
    """Compute the negative log partial likelihood of Cox (1972), ties by Efron (1977), per case; 0 if censored.

    Args:
        log_risks: Linear predictors of the complete risk set.
        time: Follow-up times, in any unit.
        event: Whether the event was seen.
    """
    order = torch.argsort(time, descending=True, stable=True)
    eta, sorted_time, died = log_risks[order], time[order], event[order]
    _, group, size = torch.unique_consecutive(sorted_time, return_inverse=True, return_counts=True)
    last = size.cumsum(0) - 1
    at_risk = torch.logcumsumexp(eta, dim=0)[last][group]
    tied = torch.zeros_like(size).index_add_(0, group, died.long())[group].clamp_min(1)
    rank = died.long().cumsum(0) - died.long() - _before_group(died.long(), size)[group]
    share = torch.where(died, rank, 0).to(eta.dtype) / tied
    tied_deaths = _group_logsumexp(eta, died, group, len(size))[group]
    # Efron's correction: log(R − share · D), where R is the risk set's sum and D that of the deaths at this time.
    reduced = torch.where(died, tied_deaths, at_risk) - at_risk
    terms = torch.where(died, at_risk + torch.log1p(-share * reduced.exp().clamp_max(1)) - eta, 0)
    return torch.zeros_like(terms).index_copy(0, order, terms)


def ranking(
    log_risks: Float[Tensor, " bag"], time: Float[Tensor, " bag"], event: Bool[Tensor, " bag"]
) -> Float[Tensor, " bag"]:
    """Compute a logistic loss over comparable pairs (Steck et al., NeurIPS 2007): a smooth bound above 1 − Harrell's C.

    A case with an event at t is compared with all cases followed beyond t. Its term is the mean of
    log2(1 + exp(η_j − η_i)) over them, or 0 if there are none.

    Args:
        log_risks: Predictors; higher is worse.
        time: Follow-up times, in any unit.
        event: Whether the event was seen.
    """
    later = time[None, :] > time[:, None]
    censored_at_same_time = (time[None, :] == time[:, None]) & ~event[None, :]
    comparable = event[:, None] & (later | censored_at_same_time)
    margins = F.softplus(log_risks[None, :] - log_risks[:, None]) / torch.log(log_risks.new_tensor(2.0))
    return (margins * comparable).sum(dim=1) / comparable.sum(dim=1).clamp_min(1)


SetLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def stratified(loss: SetLoss, log_risks: Float[Tensor, " bag"], targets: Targets) -> Float[Tensor, " bag"]:
    """Compute a loss over sets within each stratum, per case: risk sets and pairs never join two strata.

    Args:
        loss: `cox` or `ranking`.
        log_risks: Linear predictors.
        targets: Outcomes and strata.
    """
    if targets.stratum is None:
        return loss(log_risks, targets.time_months, targets.event)
    terms = torch.zeros_like(log_risks)
    for number in targets.stratum.unique():
        rows = torch.nonzero(targets.stratum == number).flatten()
        terms = terms.index_copy(0, rows, loss(log_risks[rows], targets.time_months[rows], targets.event[rows]))
    return terms


def _cox_of_logits(logits: Tensor, targets: Targets, *, alpha: float = 0.0) -> Tensor:
    return stratified(cox, log_risk(at_least_f32(logits)), targets)


def _ranking_of_logits(logits: Tensor, targets: Targets, *, alpha: float = 0.0) -> Tensor:
    return stratified(ranking, log_risk(at_least_f32(logits)), targets)


@dataclass(frozen=True)
class Loss:
    """One entry of the loss registry.

    Attributes:
        over_logits: `over_logits(logits [bag, bin], targets, alpha=…)` → [bag], each case's term of the loss.
        set_wise: A case's term depends on the other cases: pass the complete, gathered set.
    """

    over_logits: LogitLoss
    set_wise: bool = False

    def __call__(self, output: SurvivalOutput, targets: Targets, *, alpha: float = 0.0) -> Float[Tensor, " bag"]:
        """Return each case's term of the loss; the loss is their sum divided by the number of cases.

        Args:
            output: Output of the model; with further branches the loss is the mean over all (DSMIL, eq. 5);
                a penalty is added.
            targets: Outcomes.
            alpha: In [0, 1], see `nll` and `ce`; `cox` and `ranking` ignore it.
        """
        terms = [self.over_logits(logits, targets, alpha=alpha) for logits in output.heads]
        loss = terms[0] if len(terms) == 1 else torch.stack(terms).mean(dim=0)
        return loss if output.penalty is None else loss + output.penalty


LOSSES: dict[str, Loss] = {
    "nll": Loss(nll),
    "ce": Loss(ce),
    "cox": Loss(_cox_of_logits, set_wise=True),
    "ranking": Loss(_ranking_of_logits, set_wise=True),
}
"""Losses by their name in a configuration; users may add entries."""


def _log_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = at_least_f32(logits)
    return F.logsigmoid(logits), -F.softplus(logits).cumsum(dim=1)


def _pick(values: Tensor, label: Int[Tensor, " bag"]) -> Tensor:
    return values.gather(1, label[:, None]).squeeze(1)


def _around_label(log_survival: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return log S_{Y−1} and log S_Y."""
    padded = F.pad(log_survival, (1, 0))
    return _pick(padded, label), _pick(padded, label + 1)


def _log_one_minus_exp(log_p: Tensor) -> Tensor:
    """Compute log(1 − exp(log_p)) for log_p ≤ 0, using the numerically accurate branch (Mächler 2012)."""
    log_p = log_p.clamp_max(-torch.finfo(log_p.dtype).tiny)
    near = log_p > -0.693
    # Each branch gets only arguments that are valid for it, so neither sends NaN through the other's gradient.
    close = torch.log(-torch.expm1(torch.where(near, log_p, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, log_p)))
    return torch.where(near, close, far)


def _before_group(counts: Tensor, size: Tensor) -> Tensor:
    """Sum `counts` over all members of the groups before each group."""
    ends = counts.cumsum(0)[size.cumsum(0) - 1]
    return F.pad(ends, (1, 0))[:-1]


def _group_logsumexp(eta: Tensor, member: Tensor, group: Tensor, groups: int) -> Tensor:
    """Compute log Σ exp(eta) over the members of each group; −inf for an empty group."""
    lowest = torch.finfo(eta.dtype).min
    masked = torch.where(member, eta.detach(), lowest)
    top = eta.new_full((groups,), lowest).scatter_reduce(0, group, masked, "amax")
    shifted = torch.where(member, eta - top[group], 0).exp() * member
    total = torch.zeros_like(top).index_add(0, group, shifted)
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).log() + top, lowest)


__all__ = ["LOSSES", "LogitLoss", "Loss", "SetLoss", "ce", "cox", "log_risk", "nll", "ranking", "stratified"]
