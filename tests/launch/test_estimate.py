"""The summary of a plan: runs, missing data by its cause, and what the rest will cost, measured or given."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from factories import CohortFiles, joint_config, make_cohorts
from made_up_sweep import AXES, finish, finished, sweep_file, truth_of
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.cohort.joint import read_cohorts
from cfusion.cohort.splits import make_splits
from launch.sweep import cost as cost_module
from launch.sweep import estimate as estimate_module
from launch.sweep.estimate import estimate
from launch.sweep.markers import ATTEMPTS_FILE, add_attempt
from launch.sweep.plan import PlannedRun, load_sweep, plan
from launch.sweep.status import look
from launch.sweep.workers import Slot


def cfusion(*arguments: object) -> str:
    """Output of a command that must succeed."""
    result = CliRunner().invoke(app, ["-q", "sweep", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def steps_of(run: PlannedRun) -> int:
    """Optimizer steps of a run: of its folds, epochs, and windows of `parallel.global_batch` patients."""
    batch, (_, splits) = run.config.parallel.global_batch, truth_of(run)
    return run.config.train.epochs * sum(math.ceil(len(split.train) / batch) for split in splits)


def test_a_summary_names_runs_and_the_price_as_measured(files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = sweep_file(files, tmp_path)
    _, runs = finished(path, left=2)
    steps = steps_of(runs[0])
    lines = cfusion("plan", path, "--slots", 2).splitlines()
    assert lines[0] == "toy: 4 runs (2 model × 2 seed): 2 done, 2 open"
    assert lines[1] == f"left: 2 runs whose data is here, 6 folds, at most {2 * steps:,} steps"
    assert lines[2] == f"slots: 2: about 60 s, at {60 / steps:.3g} s a step (measured on 2 runs)"
    assert lines[3].startswith("disk: 0.00 GB once they are done, as the finished runs")
    assert lines[-1] == "runs: --list"
    found = json.loads(cfusion("plan", path, "--slots", 2, "--json"))
    assert found["counts"] == {"done": 2, "running": 0, "failed": 0, "open": 2}
    assert found["missing"] == {}
    cost = found["estimate"]
    assert (cost["runs"], cost["folds"], cost["steps"], cost["slots"]) == (2, 6, 2 * steps, 2)
    assert cost["hours"] == pytest.approx(60 / 3600)
    assert cost["gpu_hours"] == 0
    assert cost["kwh"] is None


def test_a_given_time_of_a_step_prices_a_sweep_before_any_run(files, tmp_path):
    path = sweep_file(files, tmp_path)
    runs = plan(load_sweep(path))
    assert "time unknown: finish a run" in cfusion("plan", path)
    slots = [Slot(4, "0,1", 0.5)] * 2 + [Slot(4, "2,3", 0.5)] * 2
    found = estimate(runs, look(runs), slots, step_seconds=0.5)
    seconds = 0.5 * sum(steps_of(run) for run in runs)
    assert found.hours == pytest.approx(seconds / 3600 / 4)
    assert found.gpu_hours == pytest.approx(seconds / 3600 * 2 * 0.5)
    assert found.measured_runs == 0
    assert found.disk_from == "counted"
    # 8 → 16 → … of both models, in four bytes a weight, three folds each, and a row for each of 48 patients
    assert 4 * 48 * 400 < found.disk_bytes < 4 * (48 * 400 + 3 * 4 * 50_000)
    assert "at 0.5 s a step (as given)" in cfusion("plan", path, "--step-seconds", 0.5)


def test_a_model_of_several_cohorts_is_priced_on_the_patients_of_all(tmp_path):
    joint = joint_config(make_cohorts(tmp_path / "cohorts", patients=24), tmp_path)
    base = joint.model_dump(mode="json", exclude={"output"})
    path = tmp_path / "joint.yaml"
    path.write_text(yaml.safe_dump({"name": "j", "output": str(tmp_path), "base": base, "axes": {"seed": [1]}}))
    cost = json.loads(cfusion("plan", path, "--step-seconds", 0.5, "--json"))["estimate"]
    splits = make_splits(read_cohorts(joint), joint.splits, joint.evaluation.protocol)
    steps = [math.ceil(len(split.train) / joint.parallel.global_batch) for split in splits]
    assert cost["steps"] == joint.train.epochs * sum(steps)
    assert cost["uncounted"] == {}
    assert cost["disk_from"] == "counted"


def test_missing_data_is_grouped_by_its_cause(files, tmp_path):
    axes = {**AXES, "encoder": {"shards": {}, "gone": {}, "lost": {}}}
    path = sweep_file(files, tmp_path, axes=axes)
    override = f"data.shards={files.shards.parent}/{{encoder}}"
    lines = cfusion("plan", path, override).splitlines()
    assert lines[1] == "data is missing for 8 runs:"
    assert [line.split(":")[0].strip() for line in lines[2:4]] == ["4", "4"]
    assert "gone: not found" in lines[2]
    assert "lost: not found" in lines[3]
    assert lines[4].startswith("left: 4 runs whose data is here, 12 folds")
    missing = json.loads(cfusion("plan", path, override, "--json"))["missing"]
    assert list(missing.values()) == [4, 4]


def test_a_table_that_cannot_be_read_is_named_once_for_all_its_runs(files, tmp_path):
    table = tmp_path / "clinical.csv"
    table.write_text(files.table.read_text().replace("event", "outcome"))
    path = sweep_file(CohortFiles(table, files.shards), tmp_path)
    lines = cfusion("plan", path, "--step-seconds", 1).splitlines()
    assert lines[1].startswith(f"steps of 4 runs not counted: {table}")
    assert "at most 0 steps" in lines[2]
    assert "time unknown" in lines[3]


def test_the_pace_is_that_of_the_most_similar_runs(files, tmp_path):
    path = sweep_file(files, tmp_path)
    _, runs = finished(path, left=4)
    for run, wall in ((runs[0], 10.0), (runs[2], 1000.0)):  # one of each model
        finish(run)
        (run.config.output / ATTEMPTS_FILE).unlink()
        add_attempt(run.config.output, {"outcome": "killed"})
        add_attempt(run.config.output, {"wall_s": wall, "cpu_s": wall, "gpu_s": wall, "energy_j": 300 * wall,
                                        "together": 1, "outcome": "done"})  # fmt: skip
    found = estimate(runs, look(runs), [Slot(1, "0", 1.0)])
    assert found.hours == pytest.approx(1010 / 3600)
    assert found.gpu_hours == pytest.approx(1010 / 3600)
    assert found.kwh == pytest.approx(300 * 1010 / 3.6e6)
    assert found.kwh_from == "measured"


def test_a_search_costs_its_trials(files, tmp_path):
    search = {"space": {"train.lr": {"low": 0.001, "high": 0.01, "log": True}, "model.embed_dim": [8, 16]}, "trials": 3}
    path = sweep_file(files, tmp_path, search=search)
    _, runs = finished(path, left=1)
    found = estimate(runs, look(runs), [Slot(1)])
    assert found.steps == 3 * steps_of(runs[0])
    per_epoch = steps_of(runs[0]) / runs[0].config.train.epochs
    done = 2 * per_epoch  # trials of one epoch, of which two are done in each fold
    assert found.step_seconds == pytest.approx(60 / done)


def test_without_a_measured_energy_the_limit_of_the_cards_bounds_it(monkeypatch):
    def question(name: str):
        return lambda handle: {"nvmlDeviceGetEnforcedPowerLimit": 700_000 + handle}[name]

    names = {"nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: 0, "NVMLError": RuntimeError}
    nvml = SimpleNamespace(**names, nvmlDeviceGetEnforcedPowerLimit=question("nvmlDeviceGetEnforcedPowerLimit"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(cost_module.importlib.util, "find_spec", lambda name: nvml)
    monkeypatch.setattr(cost_module, "_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=i))
    assert cost_module.gpu_watts() == 700
    assert estimate_module._energy([], 2.0) == (1.4, "limit")
    assert estimate_module._energy([], 0.0) == (None, "")
    monkeypatch.setattr(cost_module, "_gpus", lambda: 0)
    assert estimate_module._energy([], 2.0) == (None, "")


def test_a_sweep_of_which_all_is_done_costs_nothing(files, tmp_path):
    path: Path = sweep_file(files, tmp_path)
    finished(path)
    assert cfusion("plan", path).splitlines() == ["toy: 4 runs (2 model × 2 seed): 4 done", "runs: --list"]
    assert len(cfusion("plan", path, "--list").splitlines()) == 4
