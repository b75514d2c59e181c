"""Members of a group that share a bag, computed as one wide product (`train.wide_folds`).

Each member's loss and gradient are those of its pass by itself, up to rounding. A bag that the wide pass refuses is
left to the members, which report it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from cfusion.errors import CfusionError
from cfusion.models.baselines import AMIL
from cfusion.models.wide_products import stacked, wide_logits
from cfusion.training.group.member import GroupMember, Visit
from cfusion.training.runtime import Runtime
from cfusion.types import SurvivalOutput


def visit_wide(runtime: Runtime, members: Iterable[GroupMember], visit: Visit) -> None:
    """Let all members that can train on a bag, or evaluate it, in one wide pass do so."""
    wide = [member for member in members if member.fold.job.config.train.wide_folds]
    _each_shape([m for m in wide if m.learns_one(visit)], lambda m: m.model, lambda some: _learn(runtime, some, visit))
    _each_shape([m for m in wide if m.shows_one(visit)], lambda m: m.copy, lambda some: _show(runtime, some, visit))


def _each_shape(
    members: Sequence[GroupMember],
    network: Callable[[GroupMember], AMIL],
    run: Callable[[Sequence[GroupMember]], None],
) -> None:
    """Run members with networks of equal shapes at once; one by itself has nothing to share."""
    by_shape: dict[object, list[GroupMember]] = {}
    for member in members:
        shapes = tuple((name, tensor.shape) for name, tensor in network(member).named_parameters())
        by_shape.setdefault(shapes, []).append(member)
    for some in by_shape.values():
        if len(some) > 1:
            try:
                run(some)
            except CfusionError:
                continue  # each of them reports it in its own pass


def _learn(runtime: Runtime, members: Sequence[GroupMember], visit: Visit) -> None:
    assert visit.learnt is not None
    parameters = {name: tensor.requires_grad_() for name, tensor in stacked([m.model for m in members]).items()}
    with runtime.autocast():
        logits = wide_logits(members[0].model, parameters, visit.learnt)
    losses = [m.loss_of(visit.bag, SurvivalOutput.from_logits(own)) for m, own in zip(members, logits, strict=True)]
    factors = [runtime.world_size / m.cases for m in members]
    runtime.backward(torch.stack([loss * factor for loss, factor in zip(losses, factors, strict=True)]).sum())
    gradients = {name: tensor.grad for name, tensor in parameters.items() if tensor.grad is not None}
    for number, (member, loss) in enumerate(zip(members, losses, strict=True)):
        member.has_learnt(visit.bag, loss.detach(), {name: gradient[number] for name, gradient in gradients.items()})


def _show(runtime: Runtime, members: Sequence[GroupMember], visit: Visit) -> None:
    assert visit.shown is not None
    with torch.no_grad(), runtime.autocast():
        logits = wide_logits(members[0].copy, stacked([m.copy for m in members]), visit.shown)
        for member, own in zip(members, logits, strict=True):
            member.has_shown(visit.bag, SurvivalOutput.from_logits(own))
