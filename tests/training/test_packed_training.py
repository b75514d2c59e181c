"""Training with packed bags gives the model of training bag by bag, whether folds share a read or not."""

from pathlib import Path

import pytest
import torch
from factories import CohortFiles, make_cohort
from group_runs import folds_of, train_together

from cfusion.config import Config
from cfusion.errors import ConfigError
from cfusion.training.folds import FoldRun, fit


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=24)


def configured(files: CohortFiles, output: Path, model: str, **train: object) -> Config:
    options = {"dropout": 0.0} if model in ("crossfusion", "abmil") else {}
    return files.config(
        output,
        model={"name": model, "embed_dim": 16, "num_heads": 2, "options": options},
        train={"epochs": 2, "lr": 1e-3, "micro_batch": 1, **train},
        parallel={"precision": "f64", "global_batch": 7},
        splits={"folds": 2},
    )


CANCELLED = ("score.bias",)
"""A softmax cancels it: its gradient is rounding, of which Adam makes a step."""


def assert_equal_models(one: FoldRun, other: FoldRun) -> None:
    expected = other.model.module.state_dict()
    for name, tensor in one.model.module.state_dict().items():
        if name not in CANCELLED:
            torch.testing.assert_close(tensor, expected[name], atol=1e-10, rtol=1e-10, msg=name)
    torch.testing.assert_close(
        torch.tensor(one.predictions["risk"].to_numpy()),
        torch.tensor(other.predictions["risk"].to_numpy()),
        atol=1e-12,
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("model", "options"), [("crossfusion", {"loss": "nll"}), ("amil", {"loss": "cox"}), ("dsmil", {"loss": "nll"})]
)
def test_packed_training_is_training_bag_by_bag(files: CohortFiles, tmp_path: Path, model: str, options: dict):
    packed = configured(files, tmp_path, model, packed=True, micro_batch=3, optimizer="adam", **options)
    one_by_one = configured(files, tmp_path, model, optimizer="adam", **options)
    cohort, (split, *_) = folds_of(packed)
    assert_equal_models(fit(packed, cohort, split), fit(one_by_one, cohort, split))


def test_folds_that_share_a_read_pack_their_bags(files: CohortFiles, tmp_path: Path):
    packed = configured(files, tmp_path, "amil", packed=True, micro_batch=3)
    one_by_one = configured(files, tmp_path, "amil")
    cohort, splits = folds_of(packed)
    for run, split in zip(train_together([packed], tmp_path), splits, strict=True):
        assert_equal_models(run, fit(one_by_one, cohort, split))


def test_a_model_without_a_packed_path_is_refused_before_training(files: CohortFiles, tmp_path: Path):
    config = configured(files, tmp_path, "transmil", packed=True, micro_batch=3)
    cohort, (split, *_) = folds_of(config)
    with pytest.raises(ConfigError, match=r"train\.packed=true: TransMIL takes no bags that are joined"):
        fit(config, cohort, split)
