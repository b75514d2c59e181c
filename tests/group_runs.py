"""Folds trained one after the other, and the same folds trained together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import cfusion
from cfusion.config import Config
from cfusion.data.loader import BagSet
from cfusion.errors import CfusionError
from cfusion.training.folds import FoldRun, fit, open_run_shards, ready_fold
from cfusion.training.group.group import Group
from cfusion.training.group.group_checkpoint import GroupCheckpoints
from cfusion.training.group.member import GroupMember
from cfusion.training.world import join_world
from cfusion.types import Cohort, Split


def folds_of(config: Config) -> tuple[Cohort, list[Split]]:
    cohort = cfusion.read_cohort(config.cohort)
    return cohort, cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)


def train_separately(configs: Sequence[Config]) -> list[FoldRun]:
    return [fit(config, folds_of(config)[0], split) for config in configs for split in folds_of(config)[1]]


def train_together(configs: Sequence[Config], folder: Path, *, background: bool = False) -> list[FoldRun]:
    """All folds of all configurations; one that fails raises."""
    runtime = join_world(configs[0].parallel)
    dataset, data = open_run_shards(configs[0]), configs[0].data
    cohort, _ = folds_of(configs[0])
    all_bags = BagSet.open(
        dataset,
        cohort.slides_of(list(cohort.cases.index)),
        data,
        magnifications=data.magnifications,
        device=runtime.device,
        dtype=runtime.dtype,
    )
    members = [
        GroupMember(
            runtime,
            ready_fold(config, cohort, split, dataset, runtime, folder=folder / "group", on_epoch=None),
            all_bags,
        )
        for config in configs
        for split in folds_of(config)[1]
    ]
    results: dict[GroupMember, FoldRun] = {}

    def fails(member: GroupMember, error: CfusionError) -> list[GroupMember]:
        raise error

    checkpoints = GroupCheckpoints(members, runtime, background=background)
    Group(runtime, all_bags, data, checkpoints, results.__setitem__, fails).train(members)
    return [results[member] for member in members]


def largest_difference(one: FoldRun, other: FoldRun) -> float:
    """Over parameters, predictions and history; the same patients and chosen epoch are asserted."""
    assert one.best_epoch == other.best_epoch
    assert list(one.predictions["case_id"]) == list(other.predictions["case_id"])
    assert one.history.shape == other.history.shape
    a, b = one.model.module.state_dict(), other.model.module.state_dict()
    differences = [(a[name] - b[name]).abs().max().item() for name in a]
    for left, right in ((one.predictions, other.predictions), (one.history, other.history)):
        numbers = left.select_dtypes("number")
        differences.append((numbers - right[numbers.columns]).abs().to_numpy().max())
    return max(differences)


def same_bits(one: FoldRun, other: FoldRun) -> bool:
    a, b = one.model.module.state_dict(), other.model.module.state_dict()
    same = all(torch.equal(a[name], b[name]) for name in a)
    return same and one.predictions.equals(other.predictions) and one.history.equals(other.history)
