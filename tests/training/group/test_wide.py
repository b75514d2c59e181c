"""Folds computed as one wide product give each fold's numbers, to rounding."""

from pathlib import Path

import pytest
import torch
from factories import CohortFiles, make_cohort
from group_runs import folds_of, train_separately, train_together

from cfusion.config import Config
from cfusion.errors import DataError
from cfusion.models import build_model
from cfusion.models.wide_products import stacked, wide_logits
from cfusion.training.folds import FoldRun
from cfusion.training.group import wide_passes
from cfusion.types import BagBatch

CANCELLED = ("score.bias",)
"""A softmax cancels it: its gradient is rounding, of which AdamW makes a step."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=30)


def configured(files: CohortFiles, output: Path, *, width: int = 16, **train: object) -> Config:
    return files.config(
        output,
        model={"name": "amil", "embed_dim": width},
        train={"epochs": 3, "lr": 1e-3, "micro_batch": 1, "folds": "together", **train},
        parallel={"precision": "f64", "global_batch": 7},
        splits={"folds": 3},
    )


def assert_equal(one: FoldRun, other: FoldRun) -> None:
    expected = other.model.module.state_dict()
    for name, tensor in one.model.module.state_dict().items():
        if name not in CANCELLED:
            torch.testing.assert_close(tensor, expected[name], atol=1e-10, rtol=1e-10, msg=name)
    risks = [torch.tensor(run.predictions["risk"].to_numpy()) for run in (one, other)]
    torch.testing.assert_close(*risks, atol=1e-12, rtol=1e-12)
    assert one.best_epoch == other.best_epoch


def test_wide_logits_and_gradients_are_those_of_each_model():
    torch.manual_seed(0)
    models = [build_model("amil", backbone_dim=5, embed_dim=8).double() for _ in range(4)]
    batch = BagBatch({"x20": torch.randn(1, 9, 5)})
    parameters = {name: tensor.requires_grad_() for name, tensor in stacked(models).items()}
    logits, weights = wide_logits(models[0], parameters, batch), torch.randn(4, 1, 4, dtype=torch.float64)
    (logits * weights).sum().backward()
    for number, model in enumerate(models):
        own = model(batch).logits
        torch.testing.assert_close(logits[number], own, atol=1e-12, rtol=1e-12)
        (own * weights[number]).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name].grad[number], parameter.grad, atol=1e-12, rtol=1e-12)


def test_folds_of_one_run_are_as_trained_separately(
    files: CohortFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes = []
    original = wide_passes.wide_logits
    monkeypatch.setattr(
        wide_passes, "wide_logits", lambda *args: passes.append(len(args[1]["head.bias"])) or original(*args)
    )
    together = train_together([configured(files, tmp_path, wide_folds=True)], tmp_path)
    assert set(passes) == {2, 3}, "a bag trains two of three folds, and the last pass shows it to all"
    for one, other in zip(together, train_separately([configured(files, tmp_path)]), strict=True):
        assert_equal(one, other)


def test_runs_of_other_widths_or_without_the_setting_share_the_read(files: CohortFiles, tmp_path: Path):
    configs = [
        configured(files, tmp_path, wide_folds=True), configured(files, tmp_path, width=8, wide_folds=True, alpha=0.5),
        configured(files, tmp_path, lr=3e-3),
    ]  # fmt: skip
    for one, other in zip(train_together(configs, tmp_path), train_separately(configs), strict=True):
        assert_equal(one, other)


def test_a_bag_without_tiles_is_reported_by_the_members(files: CohortFiles, tmp_path: Path, monkeypatch):
    def refuses(*_arguments: object) -> None:
        raise DataError("made up")

    monkeypatch.setattr(wide_passes, "wide_logits", refuses)
    config = configured(files, tmp_path, wide_folds=True)
    assert len(folds_of(config)[1]) == 3
    for one, other in zip(train_together([config], tmp_path), train_separately([config]), strict=True):
        assert_equal(one, other)
