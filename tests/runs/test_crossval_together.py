"""Test that complete runs whose folds share one read write the same files as separate runs."""

import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factories import CohortFiles, make_cohort
from mlflow import MlflowClient

from cfusion.config import Config
from cfusion.errors import ConfigError, DataError, PartialResultError, RequeueError
from cfusion.run_folder import is_done
from cfusion.runs.crossval import cross_validate, cross_validate_together, shares_a_read
from cfusion.training.group import group


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=40)


def run(files: CohortFiles, output: Path, folds: str = "together", **sections) -> Config:
    train = {"epochs": 2, "folds": folds, **sections.pop("train", {})}
    values = {"splits": {"folds": 2}, "model": {"name": "amil", "embed_dim": 16}, "evaluation": {"bootstrap": 20}}
    parallel = {"precision": "f64", "global_batch": 8}
    return files.config(output, train=train, parallel=parallel, **{**values, **sections})


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_runs_together_write_the_files_and_numbers_of_separate_runs(files, tmp_path):
    def tracked(how: str) -> dict[str, dict[str, object]]:
        return {"tracking": {"enabled": True, "uri": f"sqlite:///{tmp_path / how / 'mlflow.db'}", "experiment": "t"}}

    seeds = (1, 2)
    singles = [run(files, tmp_path / "separate" / str(s), "separate", seed=s, **tracked("separate")) for s in seeds]
    together = [run(files, tmp_path / "together" / str(s), seed=s, **tracked("together")) for s in seeds]
    assert len({shares_a_read(config) for config in together}) == 1
    for config in singles:
        cross_validate(config)
    scores = cross_validate_together(together)
    for one, other, scored in zip(singles, together, scores, strict=True):
        assert is_done(other.output)
        assert contents(one.output) == contents(other.output)
        left, right = (pd.read_csv(config.output / "predictions.csv") for config in (one, other))
        np.testing.assert_allclose(left["risk"], right["risk"], atol=1e-9)
        np.testing.assert_allclose(
            pd.read_csv(one.output / "summary.csv")["cindex_pooled"], scored.summary["cindex_pooled"], atol=1e-9
        )
    client = MlflowClient(str(together[0].tracking.uri))
    runs = client.search_runs([client.get_experiment_by_name("t").experiment_id])
    assert len(runs) == 6
    assert {found.info.status for found in runs} == {"FINISHED"}
    child = next(found for found in runs if "mlflow.parentRunId" in found.data.tags)
    assert [point.step for point in client.get_metric_history(child.info.run_id, "train_loss")] == [0, 1]


def test_a_run_that_fails_leaves_the_others_going_on(files, tmp_path):
    good = run(files, tmp_path / "good")
    bad = run(files, tmp_path / "bad", train={"lr": 1e200, "clip_norm": None, "warmup_fraction": 0.0})
    with pytest.raises(
        PartialResultError, match=r"1 of 2 runs failed.*bad: The .* is not finite.*Bags of the step: PT-"
    ):
        cross_validate_together([bad, good])
    assert is_done(good.output)
    assert not is_done(bad.output)
    assert not (bad.output / "summary.csv").exists()
    with pytest.raises(DataError, match="not finite"):
        cross_validate(bad)


def test_a_stopped_run_exits_with_75_and_resumes(files, tmp_path, monkeypatch):
    config = run(files, tmp_path / "run")
    original, seen = group.stop_requested, 0

    def signalled() -> bool:
        nonlocal seen
        seen += 1
        if seen == 60:
            signal.raise_signal(signal.SIGTERM)
        return original()

    monkeypatch.setattr(group, "stop_requested", signalled)
    with pytest.raises(RequeueError) as stopped:
        cross_validate(config)
    assert stopped.value.exit_code == 75
    assert not is_done(config.output)
    cross_validate(config)
    assert is_done(config.output)
    before = (config.output / "predictions.csv").read_bytes()
    for path in sorted((config.output / "fold_1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (config.output / "fold_1").rmdir()
    kept = (config.output / "fold_0" / "predictions.csv").stat().st_mtime_ns
    cross_validate(config)
    assert (config.output / "predictions.csv").read_bytes() == before
    assert (config.output / "fold_0" / "predictions.csv").stat().st_mtime_ns == kept


@pytest.mark.slow
@pytest.mark.parametrize(("resumed", "later"), [((1, 0), ()), ((1,), (0,))], ids=["other order", "one left out"])
def test_the_state_of_runs_together_is_found_in_any_order(files, tmp_path, monkeypatch, resumed, later):
    """Stopped in the second pass; the first run's folder holds the state, and only the second's starts the resume."""
    complete, stopped = (
        [run(files, tmp_path / how / str(s), seed=s) for s in (1, 2)] for how in ("complete", "stopped")
    )
    passes: list[int] = []
    original = group.Group._pass

    def noted(self, active, number):
        passes.append(number)
        original(self, active, number)

    monkeypatch.setattr(group.Group, "_pass", noted)
    cross_validate_together(complete)
    undisturbed = list(passes)
    with monkeypatch.context() as patch:
        patch.setattr(group, "stop_requested", lambda: passes[-1:] == [1] and len(passes) > len(undisturbed))
        with pytest.raises(RequeueError):
            cross_validate_together(stopped)
    assert list((stopped[0].output / "checkpoints" / "group").glob("step_*"))
    for numbers in (resumed, later):
        passes.clear()
        if numbers:
            cross_validate_together([stopped[i] for i in numbers])
            assert passes == undisturbed[1:], "the state was found: the first pass is not done again"
    for one, other in zip(complete, stopped, strict=True):
        assert (one.output / "predictions.csv").read_bytes() == (other.output / "predictions.csv").read_bytes()
        assert contents(one.output) == contents(other.output)


def test_runs_that_cannot_share_a_read_are_refused_by_what_differs(files, tmp_path):
    one = run(files, tmp_path / "one")
    with pytest.raises(ConfigError, match=r"cannot share a read: they differ in data\.unit, data\.order_seed"):
        cross_validate_together([one, run(files, tmp_path / "two", data={"order_seed": 1, "unit": "slide"})])
    with pytest.raises(ConfigError, match=r"two: train\.folds=separate"):
        cross_validate_together([one, run(files, tmp_path / "two", "separate")])
    with pytest.raises(ConfigError, match="different outputs"):
        cross_validate_together([one, one])
    assert shares_a_read(one) == shares_a_read(run(files, tmp_path / "two", seed=5, model={"name": "mean_mil"}))
    assert not (tmp_path / "one").exists()
