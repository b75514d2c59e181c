"""A sweep with a search on each executor: the same trials, the same choices, the same predictions."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factories import CohortFiles, make_cohort
from slurm_cluster import slurm_of_one_node, why_not

from cfusion.config import validate
from launch.sweep.execute import Execution, run_all
from launch.sweep.plan import PlannedRun, SweepConfig, plan
from launch.sweep.results import report_sweep
from launch.sweep.status import look
from launch.tasks import slurm_array, slurm_states
from launch.tasks.task import TaskResources

pytestmark = pytest.mark.slow

SEARCH = {
    "space": {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.embed_dim": [8, 16]},
    "trials": 3,
    "sampler": "random",
}
ONE_CORE = TaskResources(cpus=1, hours=0.2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    pytest.importorskip("optuna")
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=36, max_cells=1)


def searching(files: CohortFiles, output: Path) -> SweepConfig:
    base = files.config(
        output, splits={"folds": 2}, train={"epochs": 2}, parallel={"precision": "f64"}, evaluation={"bootstrap": 0}
    ).model_dump(mode="json", exclude={"output"})
    axes = {"seed": {"1": {"seed": 1}, "2": {"seed": 2}}}
    values = {"name": "tuned", "output": str(output), "base": base, "axes": axes, "search": SEARCH}
    return validate(SweepConfig, values, "test")


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory) -> list[PlannedRun]:
    """The runs of the sweep, each done in one worker of this machine."""
    folder = tmp_path_factory.mktemp("one-worker")
    runs = plan(searching(files, folder))
    run_all(runs, Execution(), folder)
    return runs


def trials(run: PlannedRun) -> list[dict]:
    folders = sorted(run.config.output.glob("search/fold_*"))
    assert [folder.name for folder in folders] == ["fold_0", "fold_1"]
    return [trial for folder in folders for trial in json.loads((folder / "trials.json").read_text())]


def chosen(run: PlannedRun) -> list[dict]:
    return [json.loads((run.config.output / f"fold_{k}" / "fold.json").read_text())["chosen"] for k in (0, 1)]


def assert_the_same(runs: list[PlannedRun], expected: list[PlannedRun]) -> None:
    assert [status.state for status in look(runs)] == ["done", "done"]
    for one, other in zip(runs, expected, strict=True):
        assert len(trials(one)) == 6
        assert {trial["state"] for trial in trials(one)} == {"done"}
        assert [t["values"] for t in trials(one)] == [t["values"] for t in trials(other)]
        np.testing.assert_allclose([t["score"] for t in trials(one)], [t["score"] for t in trials(other)])
        assert chosen(one) == chosen(other)
        frames = [pd.read_csv(run.config.output / "predictions.csv") for run in (one, other)]
        pd.testing.assert_frame_equal(*frames, rtol=1e-9, obj=one.name)


def test_two_runs_at_a_time_each_in_two_processes_search_as_one_worker(files, expected, tmp_path):
    sweep = searching(files, tmp_path)
    runs = plan(sweep)
    run_all(runs, Execution(slots=2, processes=2), tmp_path)
    assert_the_same(runs, expected)
    page = report_sweep(sweep, runs, tmp_path / "report").read_text()
    assert "What was searched" in page
    assert all(run.name in page for run in runs)


@pytest.mark.long
def test_tasks_of_ray_search_as_one_worker(files, expected, tmp_path):
    pytest.importorskip("ray")
    runs = plan(searching(files, tmp_path))
    run_all(runs, Execution("ray", resources=TaskResources(cpus=1, max_parallel=2), address="local"), tmp_path)
    assert_the_same(runs, expected)


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "SLURM")
def test_an_array_of_slurm_searches_as_one_worker(files, expected, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(slurm_states, "_LONGEST", 2.0)
    monkeypatch.setattr(slurm_array, "_RESULT_SECONDS", 3.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
    runs = plan(searching(files, tmp_path))
    with slurm_of_one_node() as configuration:
        monkeypatch.setenv("SLURM_CONF", str(configuration))
        run_all(runs, Execution("slurm", resources=ONE_CORE), tmp_path)
    assert_the_same(runs, expected)
