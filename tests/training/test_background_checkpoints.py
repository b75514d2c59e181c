"""A fold, and folds that share a read, whose checkpoints a thread writes: the same result, resumed or not."""

from pathlib import Path

import pytest
import torch
from factories import CohortFiles, make_cohort
from group_runs import folds_of, train_together

from cfusion.errors import RequeueError
from cfusion.training import checkpoint, loop
from cfusion.training.folds import FoldRun, fit
from cfusion.training.group import group_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=24)


def assert_same(one: FoldRun, other: FoldRun) -> None:
    expected = other.model.module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in one.model.module.state_dict().items())
    assert one.predictions.equals(other.predictions)


def test_a_fold_is_the_same_and_resumes(files: CohortFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", -1.0)
    config = files.config(tmp_path, train={"background_checkpoints": True, "ema": 0.9}, splits={"folds": 2})
    cohort, (split, *_) = folds_of(config)
    plain = fit(files.config(tmp_path, train={"ema": 0.9}, splits={"folds": 2}), cohort, split)
    asked = iter([False] * 3 + [True])
    monkeypatch.setattr(loop, "stop_requested", lambda: next(asked, False))
    with pytest.raises(RequeueError):
        fit(config, cohort, split, folder=tmp_path / "state")
    assert_same(fit(config, cohort, split, folder=tmp_path / "state"), plain)
    assert not list((tmp_path / "state").glob(".*")), "nothing is left of the writing"


def test_folds_that_share_a_read_are_the_same(files: CohortFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group_checkpoint, "INTERVAL_SECONDS", -1.0)
    config = files.config(tmp_path, splits={"folds": 2})
    plain, background = (train_together([config], tmp_path / str(by), background=by) for by in (False, True))
    for one, other in zip(plain, background, strict=True):
        assert_same(one, other)
    assert not (tmp_path / "True" / "group").exists(), "finished folds need no checkpoints"
