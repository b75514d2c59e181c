"""The product of axes, names that say what decides the numbers, and a pool that survives its workers."""

import os
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from factories import CohortFiles, joint_config, make_cohorts

from cfusion.config import Config, validate
from cfusion.errors import ConfigError, PartialResultError
from launch.sweep.data_digests import places
from launch.sweep.execute import Execution
from launch.sweep.execute import run_all as run_sweep
from launch.sweep.plan import PlannedRun, SweepConfig, load_sweep, plan


def run_all(runs: list[PlannedRun], **how) -> None:
    run_sweep(runs, Execution(**how), runs[0].config.output.parents[1])


def sweep(files: CohortFiles, output: Path, **more) -> SweepConfig:
    base = files.config(output).model_dump(mode="json", exclude={"output"})
    values = {
        "name": "test",
        "output": str(output),
        "base": base,
        "axes": {
            "model": {"amil": {"model.name": "amil"}, "mean": {"model.name": "mean_mil"}},
            "seed": {"7": {"seed": 7}},
        },
    }
    return validate(SweepConfig, {**values, **more}, "test")


def test_the_plan_is_the_product_less_what_is_excluded(files, tmp_path):
    axes = {
        "model": {"amil": {"model.name": "amil"}, "mean": {"model.name": "mean_mil"}},
        "seed": {str(s): {"seed": s} for s in range(3)},
    }
    runs = plan(sweep(files, tmp_path, axes=axes, exclude=[{"model": "mean", "seed": "2"}]))
    assert [tuple(run.values.values()) for run in runs] == [
        ("amil", "0"), ("amil", "1"), ("amil", "2"), ("mean", "0"), ("mean", "1"),
    ]  # fmt: skip
    assert runs[1].config.seed == 1
    assert runs[1].config.output == tmp_path / "runs" / runs[1].name


def test_a_name_changes_only_with_the_configuration_and_the_data(files, tmp_path):
    names = [run.name for run in plan(sweep(files, tmp_path))]
    assert names == [run.name for run in plan(sweep(files, tmp_path))]
    base = files.config(tmp_path, train={"epochs": 9}).model_dump(mode="json", exclude={"output"})
    assert not set(names) & {run.name for run in plan(sweep(files, tmp_path, base=base))}
    table = tmp_path / "clinical.csv"
    table.write_text(files.table.read_text() + "\n")
    moved = CohortFiles(table, files.shards).config(tmp_path).model_dump(mode="json", exclude={"output"})
    assert not set(names) & {run.name for run in plan(sweep(files, tmp_path, base=moved))}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"exclude": [{"model": "nobody"}]}, "exclude names model: nobody: there is no nobody on the axis model"),
        ({"axes": {"a": {"x": {"train.epoch": 1}}}}, r"run x: unknown key train\.epoch\. Did you mean train\.epochs"),
        ({"axis": {}}, "unknown key axis. Did you mean axes"),
    ],
)
def test_the_error_for_a_wrong_sweep_names_its_key(files, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        plan(sweep(files, tmp_path, **more))


def test_every_cohort_and_the_start_of_a_joint_run_are_in_its_name(tmp_path):
    def named(config: Config) -> PlannedRun:
        base = config.model_dump(mode="json", exclude={"output"})
        axes = {"seed": {"7": {"seed": 7}}}
        values = {"name": "j", "output": str(tmp_path), "base": base, "axes": axes}
        return plan(validate(SweepConfig, values, "test"))[0]

    files = make_cohorts(tmp_path / "cohorts", patients=6)
    joint = joint_config(files, tmp_path)
    first = named(joint)
    assert not first.absent
    assert {key.split(".")[-1] for key in places(joint)} >= {"table", "0", "1"}
    table = files["long"].table
    table.write_text(table.read_text() + "\n")
    assert named(joint).name != first.name
    start = tmp_path / "model"
    start.mkdir()
    for name, content in (("model.json", "{}"), ("model.safetensors", "weights")):
        (start / name).write_text(content)
    started = joint_config(files, tmp_path, train={"start_from": str(start)})
    second = named(started)
    assert not second.absent
    (start / "model.safetensors").write_text("others")
    assert len({first.name, second.name, named(started).name}) == 3
    nowhere = joint_config(files, tmp_path, train={"start_from": str(tmp_path / "nowhere")})
    assert "nowhere: not found" in named(nowhere).absent
    registered = named(joint_config(files, tmp_path, train={"start_from": "models:/x@champion"}))
    assert not registered.absent
    assert registered.name != named(joint).name


def test_a_digest_of_code_without_letters_is_text(files, tmp_path):
    assert sweep(files, tmp_path, code=9999523186).code == "9999523186"
    octal = yaml.safe_load("code: 0123456701")["code"]
    with pytest.raises(ConfigError, match="write the digest in quotes"):
        sweep(files, tmp_path, code=octal)
    assert sweep(files, tmp_path, code="0123456701").code == "0123456701"


def test_a_missing_sweep_file_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_sweep(tmp_path / "none.yaml")


@pytest.mark.slow
def test_what_is_done_is_not_done_again(files, tmp_path):
    runs = plan(sweep(files, tmp_path))
    run_all(runs, slots=2)
    stamps = {run.name: (run.config.output / "done.json").stat().st_mtime_ns for run in runs}
    run_all(runs, slots=2)
    assert stamps == {run.name: (run.config.output / "done.json").stat().st_mtime_ns for run in runs}


@pytest.mark.slow
def test_a_failed_run_is_reported_with_its_cause_and_the_rest_is_done(files, tmp_path):
    axes = {"encoder": {"right": {}, "wrong": {"data.encoder": "uni"}}}
    runs = plan(sweep(files, tmp_path, axes=axes))
    with pytest.raises(PartialResultError, match=r"1 of 2 runs failed. wrong-\w+: .*expected data\.encoder=uni"):
        run_all(runs, slots=1)
    assert (runs[0].config.output / "done.json").exists()
    assert "expected data.encoder=uni" in (runs[1].config.output / "run.log").read_text()


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_the_numbers_are_the_same(files, tmp_path):
    undisturbed = plan(sweep(files, tmp_path / "a"))
    run_all(undisturbed, slots=1)
    disturbed = plan(sweep(files, tmp_path / "b"))
    killed = threading.Event()
    stop = threading.Event()

    def kill_first_worker() -> None:
        while not stop.is_set() and not killed.is_set():
            if list(tmp_path.glob("b/runs/*/fold_0/fold.json")):
                for pid in children(os.getpid()):
                    os.kill(pid, signal.SIGKILL)
                    killed.set()
            time.sleep(0.01)

    killer = threading.Thread(target=kill_first_worker)
    killer.start()
    try:
        run_all(disturbed, slots=1, retries=1)
    finally:
        stop.set()
        killer.join()
    assert killed.is_set()
    for one, other in zip(undisturbed, disturbed, strict=True):
        frames = [pd.read_csv(run.config.output / "predictions.csv") for run in (one, other)]
        pd.testing.assert_frame_equal(*frames, check_exact=True, obj=one.name)


def children(pid: int) -> list[int]:
    """Return the pids of the worker processes: children of the server that this process's children are forked from."""
    import psutil

    servers = [child for child in psutil.Process(pid).children() if "forkserver" in " ".join(child.cmdline())]
    return [child.pid for server in servers for child in server.children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_search_is_part_of_every_run_and_stands_in_one_place(files, tmp_path):
    search = {"space": {"train.lr": {"low": 0.001, "high": 0.01, "log": True}}, "trials": 2}
    plain, searching = plan(sweep(files, tmp_path)), plan(sweep(files, tmp_path, search=search))
    assert [run.config.search.trials for run in searching] == [2, 2]
    assert not {run.name for run in plain} & {run.name for run in searching}
    with pytest.raises(ConfigError, match=r"search\.space and axes\.seed both set seed"):
        sweep(files, tmp_path, search={"space": {"seed": [1, 2]}})
    base = files.config(tmp_path, search=search).model_dump(mode="json", exclude={"output"})
    with pytest.raises(ConfigError, match="search stands at the top of the file and in base"):
        sweep(files, tmp_path, base=base, search=search)
