"""Sweeps as people use them: the command line, its words for what is wrong, and runs that share a read."""

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from factories import CohortFiles
from made_up_sweep import sweep_file
from typer.testing import CliRunner

from cfusion import program
from cfusion.cli.main import app
from cfusion.cli.sweep_views import duration, legend, picture, status_table, words
from cfusion.errors import ConfigError, DataError, PartialResultError
from cfusion.run_folder import claim
from launch.sweep import plan as plan_module
from launch.sweep import status as status_module
from launch.sweep.data_digests import DataDigests
from launch.sweep.execute import Execution, jobs_of, run_all
from launch.sweep.markers import FAILED, add_attempt, attempts, write_failure
from launch.sweep.plan import PlannedRun, SweepConfig, load_sweep, plan
from launch.sweep.results import members_of
from launch.sweep.status import counts, grid, look, seconds_left
from launch.sweep.work import Job

AXES: dict[str, Any] = {
    "encoder": {"made-up": {}},
    "model": {"amil": {"model.name": "amil"}, "mean": {"model.name": "mean_mil"}},
    "seed": [1, 2],
}


def written(files: CohortFiles, folder: Path, **more: Any) -> Path:
    """A sweep file on a made-up cohort."""
    return sweep_file(files, folder, **{"axes": AXES, **more})


def cfusion(*arguments: str) -> str:
    """Output of a command that must succeed."""
    result = CliRunner().invoke(app, ["-q", "sweep", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def done(files, tmp_path_factory) -> Path:
    """The file of a sweep that was run through the command line: all but the last run, which is open."""
    path = written(files, tmp_path_factory.mktemp("done"))
    assert "3 runs are done" in cfusion("run", str(path), "--slots", "2", "--limit", "3")
    return path


def test_plan_and_status_say_the_same_in_lines_and_in_json(done):
    lines = [line.split("\t") for line in cfusion("plan", str(done), "--list").splitlines()]
    assert [line[0] for line in lines] == ["done", "done", "done", "open"]
    assert [line[2] for line in lines] == ["3/3", "3/3", "3/3", "0/3"]
    report = json.loads(cfusion("status", str(done), "--json"))
    assert report["counts"] == {"done": 3, "running": 0, "failed": 0, "open": 1}
    assert [run["name"] for run in report["runs"]] == [line[1] for line in lines]
    assert 0 < report["seconds_left"] < 600
    assert report["stale"] == []


def test_only_chooses_and_a_changed_setting_leaves_stale_runs(done):
    names = [line.split("\t")[1] for line in cfusion("plan", str(done), "--list", "--only", "model=amil").splitlines()]
    assert [name.startswith("made-up-amil-") for name in names] == [True, True]
    report = json.loads(cfusion("plan", str(done), "train.epochs=5", "--json"))
    assert report["counts"]["open"] == 4
    assert len(report["stale"]) == 3


def test_runs_of_other_code_are_stale_unless_the_file_counts_them(done, monkeypatch, tmp_path):
    name = json.loads(cfusion("plan", str(done), "--json"))["runs"][0]["name"]
    mine = program.code_digest()
    for module in (plan_module, status_module):
        monkeypatch.setattr(module, "code_digest", lambda: "edited")
    report = json.loads(cfusion("plan", str(done), "--json"))
    assert report["counts"]["done"] == 0
    assert len(report["stale"]) == 3
    assert report["stale_codes"] == {mine: 3}
    why = f"3 finished runs do not count, as they are by other code; if its numbers are the same, add code: '{mine}'"
    for command, *options in (("status",), ("run", "--dry-run"), ("report", "--out", str(tmp_path))):
        assert why in CliRunner().invoke(app, ["sweep", command, str(done), *options]).output, command
    kept = done.with_name("kept.yaml")
    kept.write_text(f"code: {mine}\n{done.read_text()}")
    report = json.loads(cfusion("plan", str(kept), "--json"))
    assert report["counts"]["done"] == 3
    assert report["runs"][0]["name"] == name
    assert report["stale"] == []


def test_a_dry_run_trains_nothing_and_audits_the_data(done):
    lines = cfusion("run", str(done), "--dry-run").splitlines()
    assert [line.split("\t")[0] for line in lines].count("would train") == 1
    assert any("48 patients" in line for line in lines if line.startswith("audit"))


def test_the_report_of_an_unfinished_sweep_names_what_is_open(done):
    page = Path(cfusion("report", str(done)).strip().removeprefix("report: "))
    table = pd.read_csv(page.parent / "cells.csv").set_index("model")
    assert table.loc["amil", "complete"]
    assert table.loc["amil", "seeds"] == 2
    assert not table.loc["mean", "complete"]
    assert table.loc["amil", "cpu_hours"] > 0
    assert "1 open of 2" in page.read_text()


def test_pictures_of_a_sweep(files, tmp_path):
    import rich.console

    runs = plan(load_sweep(written(files, tmp_path)))
    write_failure(runs[0].config.output, "RuntimeError: two\nlines")
    statuses = look(runs)
    console = rich.console.Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    for drawn in (status_table(statuses, list(runs[0].values)), picture(*grid(statuses, list(runs[0].values)))):
        console.print(drawn)
    for line in (legend(counts(statuses)), *words(statuses)):
        console.print(line)
    text = console.export_text()
    assert text.count("■■ 0/2") == 2
    assert "failed 1" in text
    assert "open 3" in text
    assert "RuntimeError: two lines (attempt 1)" in text
    assert "run.log" in text
    assert seconds_left(statuses) is None
    assert [duration(s) for s in (5, 600, 7200, 10**6)] == ["5 s", "10 min", "2.0 h", "11.6 days"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "cohrt=x"], "--only cohrt=x: there is no axis cohrt"),
        (["--only", "encoder=made-upp"], r"there is no made-upp on the axis encoder\. Did you mean made-up\?"),
        (["seed=3"], r"seed=…: the axis seed of .* sets it\. Choose with --only seed=VALUE"),
        (["train.epoch=3"], r"unknown key train\.epoch\. Did you mean train\.epochs\?"),
        (["model.name=amill"], r"the axis model of .* sets it"),
    ],
)
def test_wrong_arguments_on_the_command_line_are_refused(done, arguments, message):
    with pytest.raises(ConfigError, match=message):
        cfusion("plan", str(done), *arguments)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"axes": {"model": ["amill"]}}, r"model\.name='amill': no such model\. Did you mean amil\?"),
        ({"axes": {"train.epoch": [3]}}, r"unknown key train\.epoch\. Did you mean train\.epochs\?"),
        ({"axes": {"seed": ["../x"]}}, r"axes\.seed: '\.\./x' becomes part of a folder's name"),
        ({"axes": {"a": {"x": {"output": "/etc"}}}}, "output is the folder of the sweep"),
        (
            {"axes": {"cohort": {"c": {"cohort.name": "{chort}"}}}},
            r"there is no axis \{chort\}\. Did you mean cohort\?",
        ),
        ({"exclude": [{"modell": "amil"}]}, r"there is no axis modell\. Did you mean model\?"),
        ({"exclude": [{"model": "amil"}, {"model": "mean"}]}, r"sweep toy: has no runs"),
        ({"axes": {"seed": [1, 2], "other": {"a": {"seed": 5}}}}, "axes seed and other both set seed"),
        (
            {"axes": {"cohort": {"c": {"data": {"shards": "x"}}}, "encoder": {"e": {"data.shards": "y"}}}},
            r"axes cohort and encoder both set data\.shards",
        ),
        (
            {"axes": {"pace": {"slow": {"seed": 3}, "fast": {"seed": 3}}}},
            r"slow-\w+ and fast-\w+ are the same run",
        ),
        ({"name": "my study/v1"}, "name: 'my study/v1' becomes a folder's name"),
        ({"base": "hello"}, "base='hello': expected sections with keys"),
        ({"base": [1]}, r"base=\[1\]: expected sections with keys"),
        ({"base": {"tracking": None}}, "tracking=None"),
        ({"base": {"tracking": 5}}, "tracking=5"),
    ],
)
def test_a_wrong_sweep_file_is_refused(files, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        plan(load_sweep(written(files, tmp_path, **more)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executor", "slrum"], r"--executor slrum: expected one of .* Did you mean slurm\?"),
        (["--gpus", "1"], r"--gpus does not go with --executor local\. Leave it out, or give --executor slurm or ray"),
        (["--executor", "ray", "--hours", "2"], r"--hours does not go with --executor ray\. .* --executor slurm\."),
        (["--executor", "slurm", "--slots", "2"], r"--slots does not go with --executor slurm"),
    ],
)
def test_an_option_that_the_executor_does_not_support_is_refused(done, options, message):
    with pytest.raises(ConfigError, match=message):
        cfusion("run", str(done), *options)


def test_the_error_for_an_unknown_cohort_or_encoder_lists_the_known_ones(files, tmp_path):
    axes = {
        "cohort": {"clinical": {}, "clinicl": {}},
        "encoder": {"shards": {}, "shard": {}},
    }
    path = written(files, tmp_path, axes=axes)
    overrides = [f"cohort.table={files.table.parent}/{{cohort}}.csv", f"data.shards={files.shards.parent}/{{encoder}}"]
    runs = plan(load_sweep(path, overrides))
    assert [bool(run.absent) for run in runs] == [False, True, True, True]
    assert runs[1].absent.endswith("shard: not found. Did you mean shards?")
    assert runs[2].absent.endswith("clinicl.csv: not found. Did you mean clinical.csv?")
    assert [status.state for status in look(runs)] == ["open", "open", "open", "open"]
    assert look(runs)[1].word == runs[1].absent
    deeper = plan(load_sweep(path, [overrides[0], f"data.shards={files.shards.parent}/{{encoder}}/packed"]))
    assert deeper[1].absent.endswith(
        "shard/packed: there is no " + f"{files.shards.parent}/shard. Did you mean shards?"
    )
    with pytest.raises(PartialResultError, match=r"3 of 4 runs failed. clinical-shard-\w+: .*shard: not found"):
        run_all(runs, Execution(), tmp_path)
    assert [status.state for status in look(runs)] == ["done", "open", "open", "open"]
    assert not runs[1].config.output.exists()


def test_shards_that_lack_cases_of_the_split_are_named_and_fatal_under_strict(files, tmp_path):
    table = tmp_path / "clinical.csv"
    extra = pd.DataFrame([{"patient": "PT-9999", "slide": "PT-9999-1", "time": 5.0, "event": 1}])
    pd.concat([pd.read_csv(files.table), extra]).to_csv(table, index=False)
    path = written(CohortFiles(table, files.shards), tmp_path, axes={"seed": [1]})
    assert "PT-9999" in cfusion("run", str(path), "--dry-run")
    runs = plan(load_sweep(path, ["evaluation.strict=true"]))
    with pytest.raises(PartialResultError, match="PT-9999"):
        run_all(runs, Execution(), tmp_path)
    assert "PT-9999" in look(runs)[0].word


@pytest.mark.slow
def test_a_run_goes_on_while_its_database_is_locked(files, tmp_path):
    database = tmp_path / "mlflow.db"
    tracked = {"enabled": True, "uri": f"sqlite:///{database}", "experiment": "toy"}
    path = written(files, tmp_path, axes={"seed": [1]})
    overrides = [f"tracking={json.dumps(tracked)}"]
    run_all(plan(load_sweep(path, [*overrides, "train.epochs=1"])), Execution(), tmp_path)
    runs = plan(load_sweep(path, overrides))
    lock = sqlite3.connect(database, timeout=60, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")

    def free() -> None:
        while not (runs[0].config.output / "fold_0").exists():
            time.sleep(0.05)
        lock.rollback()

    watch = threading.Thread(target=free)
    watch.start()
    try:
        run_all(runs, Execution(), tmp_path)
    finally:
        watch.join()
        lock.close()
    assert look(runs)[0].state == "done"


def test_names_follow_shards_tables_and_splits(files, tmp_path):
    import shutil

    shards, splits = tmp_path / "shards", tmp_path / "splits"
    shutil.copytree(files.shards, shards)
    splits.mkdir()
    (splits / "splits_0.csv").write_text("train,val\nPT-0001,PT-0002\n")
    path = written(CohortFiles(files.table, shards), tmp_path)

    def names() -> set[str]:
        return {run.name for run in plan(load_sweep(path, [f"splits.directory={splits}"]))}

    first = names()
    assert names() == first
    (splits / "splits_0.csv").write_text("train,val\nPT-0002,PT-0001\n")
    second = names()
    index = shards / "index.json"
    index.write_text(index.read_text().replace('"seed":', '"seed": '))
    assert not first & second
    assert not second & names()


@pytest.mark.slow
def test_a_run_whose_data_or_program_changed_after_it_was_named_is_not_begun(files, tmp_path, monkeypatch):
    table = tmp_path / "clinical.csv"
    table.write_text(files.table.read_text())
    path = written(CohortFiles(table, files.shards), tmp_path, axes={"seed": [1]})
    runs = plan(load_sweep(path))
    table.write_text(files.table.read_text() + "\n")
    [outcome] = Job(tuple(runs))()
    assert (outcome.state, outcome.again) == ("failed", "no")
    assert outcome.cause == f"Changed since the run was planned: {table}. Start the sweep again."
    [status] = look(runs)
    assert status.word.startswith(outcome.cause)
    assert outcome.cause in status.log.read_text()
    again = plan(load_sweep(path))
    monkeypatch.setattr(plan_module, "code_digest", lambda: "edited")
    assert again[0].changed(DataDigests({})) == "Changed since the run was planned: the program. Start the sweep again."
    monkeypatch.undo()
    run_all(again, Execution(), tmp_path / "sweep")
    assert again[0].name != runs[0].name


@pytest.mark.slow
def test_tracking_files_next_to_the_runs_are_not_stale_runs(files, tmp_path):
    path = written(files, tmp_path, axes={"seed": [1]})
    cfusion("run", str(path), "tracking.enabled=true")
    report = json.loads(cfusion("plan", str(path), "tracking.enabled=true", "--json"))
    [run] = report["runs"]
    assert {entry.name for entry in (tmp_path / "sweep" / "runs").iterdir() if entry.is_dir()} > {run["name"]}
    assert report["stale"] == []


def test_a_place_that_is_not_reached_keeps_its_own_runs_from_starting(files, tmp_path, monkeypatch):
    from cfusion.data import remote

    monkeypatch.setattr(remote, "_pauses", lambda: [None])
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        far = f"http://127.0.0.1:{nobody.getsockname()[1]}/shards"
        axes = {"encoder": {"near": {"data.shards": str(files.shards)}, "far": {"data.shards": far}}}
        near, away = plan(load_sweep(written(files, tmp_path, axes=axes)))
    assert near.absent == ""
    assert far in away.absent


@pytest.mark.slow
def test_runs_keep_their_names_where_their_shards_have_gone(files, tmp_path):
    import shutil

    shards = tmp_path / "shards"
    shutil.copytree(files.shards, shards)
    path = written(CohortFiles(files.table, shards), tmp_path, axes={"seed": [1]})
    runs = plan(load_sweep(path))
    run_all(runs, Execution(), tmp_path / "sweep")
    shutil.rmtree(shards)
    later = plan(load_sweep(path))
    assert [run.name for run in later] == [run.name for run in runs]
    assert "not found" in later[0].absent
    assert look(later)[0].state == "done"
    assert cfusion("report", str(path)).startswith("report: ")


@pytest.mark.slow
def test_runs_that_share_a_read_are_one_job_and_end_with_the_same_bytes(files, tmp_path):
    together = plan(load_sweep(written(files, tmp_path), ["train.folds=together"]))
    separate = plan(load_sweep(written(files, tmp_path)))
    assert [len(job.runs) for job in jobs_of(together, Execution(group=3))] == [3, 1]
    assert [len(job.runs) for job in jobs_of(separate, Execution(group=3))] == [1, 1, 1, 1]
    assert [len(job.runs) for job in jobs_of(together, Execution(group=3, processes=2))] == [1, 1, 1, 1]
    run_all(together, Execution(slots=1, group=4), tmp_path)
    run_all(separate, Execution(slots=2), tmp_path)
    assert_same_risks(together, separate)
    costs = [attempts(run.config.output)[0] for run in together]
    assert {cost["together"] for cost in costs} == {4}
    assert len({cost["cpu_s"] for cost in costs}) == 1


def assert_same_risks(some: Sequence[PlannedRun], others: Sequence[PlannedRun]) -> None:
    for one, other in zip(some, others, strict=True):
        frames = [pd.read_csv(run.config.output / "predictions.csv") for run in (one, other)]
        pd.testing.assert_frame_equal(*frames, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_folds_as_an_axis_are_one_result(files, tmp_path):
    axes = {"fold": [0, 1, 2], "model": ["amil", "mean_mil"]}
    runs = plan(load_sweep(written(files, tmp_path, axes=axes)))
    members = members_of(runs, look(runs))
    assert {member.model for member in members} == {"amil", "mean_mil"}
    complete = plan(load_sweep(written(files, tmp_path, axes={"model": {"amil": {"model.name": "amil"}}})))
    mine = [run for run in runs if run.values["model"] == "amil"]
    run_all([*mine, *complete], Execution(slots=2), tmp_path)
    parts = [pd.read_csv(run.config.output / "predictions.csv") for run in mine]
    together = pd.concat(parts, ignore_index=True)
    pd.testing.assert_frame_equal(together, pd.read_csv(complete[0].config.output / "predictions.csv"))


def test_a_run_that_another_process_holds_is_not_marked_by_who_lost_a_worker(files, tmp_path):
    free, held = plan(load_sweep(written(files, tmp_path, axes={"seed": [1, 2]})))
    with claim(held.config.output):
        outcomes = Job((free, held)).lost("the worker was killed")
    assert [outcome.state for outcome in outcomes] == ["failed", "held"]
    assert [attempts(run.config.output) for run in (free, held)] == [[{"outcome": "killed"}], []]
    assert not (held.config.output / FAILED).exists()


def test_what_else_varies_makes_another_model(files, tmp_path):
    axes = {**AXES, "lr": {"slow": {"train.lr": 1e-4}, "fast": {"train.lr": 1e-2}}}
    runs = plan(load_sweep(written(files, tmp_path, axes=axes)))
    models = {member.model for member in members_of(runs, look(runs))}
    assert models == {"amil, slow", "amil, fast", "mean, slow", "mean, fast"}


def test_attempts_that_ended_before_a_first_fold_cost_what_they_cost(files, tmp_path):
    runs = plan(load_sweep(written(files, tmp_path)))
    spent = {"wall_s": 1800.0, "cpu_s": 3600.0, "gpu_s": 1800.0, "energy_j": 3.6e6, "together": 1}
    failed, stopped, killed, untried = runs
    for run, outcome, cost in (failed, "failed", spent), (failed, "failed", spent), (stopped, "stopped", spent):
        add_attempt(run.config.output, {"outcome": outcome, **cost})
    write_failure(failed.config.output, "no loss")
    add_attempt(killed.config.output, {"outcome": "killed"})
    costs = {member.name: member.cost for member in members_of(runs, look(runs))}
    assert (costs[failed.name].cpu_hours, costs[failed.name].gpu_hours, costs[failed.name].energy_kwh) == (2, 1, 2)
    assert costs[stopped.name].cpu_hours == 1
    assert [costs[run.name].cpu_hours + costs[run.name].gpu_hours for run in (killed, untried)] == [0, 0]


def test_a_report_needs_a_finished_run(files, tmp_path):
    with pytest.raises(DataError, match="none of the sweep's runs is done"):
        cfusion("report", str(written(files, tmp_path)))


@pytest.mark.slow
def test_ten_thousand_runs_are_planned_and_looked_at(files, tmp_path):
    keys = ("seed", "data.order_seed", "splits.seed", "train.epochs")
    axes = {key: {str(v): {key: v} for v in range(1, 11)} for key in keys}
    sweep = SweepConfig(name="large", output=tmp_path, axes=axes)
    runs = plan(sweep)
    assert len({run.name for run in runs}) == 10_000
    (runs[5].config.output).mkdir(parents=True)
    (runs[5].config.output / "done.json").write_text("{}")
    assert counts(look(runs))["done"] == 1
