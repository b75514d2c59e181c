"""Disk and cost of a sweep: what can go is shown first, and what another process trains stays."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from cfusion.cli import cmd_sweep
from cfusion.cli.main import app
from cfusion.cli.sweep_views import cost
from cfusion.doctor.checks import Check
from cfusion.doctor.verdict import describe_verdict, verdict
from cfusion.files import _machine
from cfusion.run_folder import claim
from launch.sweep.clean import disk_use
from launch.sweep.markers import add_attempt
from launch.sweep.plan import load_sweep, plan
from launch.sweep.status import look, spent


@pytest.fixture
def sweep(files, tmp_path: Path) -> Path:
    """A sweep of two runs, one done with left-over checkpoints, one open; a stale run; MLflow's files next to them."""
    base = files.config(tmp_path).model_dump(mode="json", exclude={"output"})
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"name": "s", "output": str(tmp_path / "s"), "base": base, "axes": {"seed": [1, 2]}})
    )
    done, left = (run.config.output for run in plan(load_sweep(path)))
    stale = done.parent / "1-0123456789"
    for folder, name, size in (
        (done, "checkpoints/fold_0/step_00000001/state", 5000), (done, "done.json", 2), (left, "checkpoints/a", 70),
        (left, f".fold_0.{_machine()}_4194305_01234567.tmp", 9), (stale, "fold_0/model", 300),
        (done.parent, "mlartifacts/x", 40),
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}" + bytes(size - 2))
    for folder in (done, left, stale):
        with claim(folder):
            pass
    return path


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["-q", "sweep", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_what_can_go_is_shown_and_removed_only_when_asked(sweep):
    runs = sweep.parent / "s" / "runs"
    before = sorted(runs.rglob("*"))
    shown = command("clean", sweep)
    assert sorted(runs.rglob("*")) == before
    assert shown.count("would remove") == 3
    assert "can be removed with --yes" in shown
    removed = command("clean", sweep, "--yes")
    assert [line.split("\t")[2:] for line in shown.splitlines() if "would" in line] == [
        line.split("\t")[2:] for line in removed.splitlines() if "removing" in line
    ]
    assert [path.name for path in runs.glob("*-0123456789")] == []
    assert not list(runs.glob("*/checkpoints/fold_0"))
    assert len(list(runs.glob("*/checkpoints/a"))) == 1, "of an unfinished run"
    assert not list(runs.glob("*/.fold_0*"))
    assert (runs / "mlartifacts" / "x").is_file()
    assert "would remove" not in command("clean", sweep)


def test_sizes_are_those_of_the_files(sweep):
    settings = load_sweep(sweep)
    use = disk_use(settings, plan(settings))
    assert (use.runs, use.checkpoints, use.tracking) == (5381, 5070, 40)
    assert {item.kind: item.size for item in use.removable} == {
        "checkpoints of a finished run": 5000, "stale run": 300, "temporary of a killed process": 9,
    }  # fmt: skip


def test_what_another_process_trains_stays(sweep):
    settings = load_sweep(sweep)
    stale = settings.output / "runs" / "1-0123456789"
    with claim(stale):
        assert stale not in [item.path for item in disk_use(settings, plan(settings)).removable]
        command("clean", sweep, "--yes")
    assert stale.is_dir()


def test_the_cost_of_all_attempts(sweep):
    runs = plan(load_sweep(sweep))
    measured = {"outcome": "done", "wall_s": 7200.0, "cpu_s": 3600.0, "gpu_s": 1800.0, "energy_j": 3.6e6, "together": 2}
    for attempt in (measured, {"outcome": "killed"}, {**measured, "energy_j": None}):
        add_attempt(runs[0].config.output, attempt)
    found = spent(look(runs))
    assert found == {"attempts": 3, "wall_s": 7200, "cpu_s": 7200, "gpu_s": 3600, "energy_j": 3.6e6}
    assert cost(found) == "spent: 2.00 h, 2.00 h of CPU, 1.00 h of GPUs, 1.00 kWh in 3 attempts"
    assert json.loads(command("status", sweep, "--json"))["cost"] == found


def test_watch_shows_the_sweep_until_nothing_is_left(sweep, monkeypatch):
    open_run = plan(load_sweep(sweep))[1].config.output
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        (open_run / "done.json").write_text("{}")

    # Not `time.sleep` itself, which threads that other tests have left call, too.
    monkeypatch.setattr(cmd_sweep, "time", SimpleNamespace(sleep=sleep))
    states = [line.split("\t")[0] for line in command("status", sweep, "--watch").splitlines()]
    assert states == ["done", "open", "done", "done"]
    assert waits == [cmd_sweep.WATCH_SECONDS]


def test_the_verdict_names_what_is_ready_and_what_is_missing():
    names = ("torch", "collectives", "mlflow", "memory", "disk", "network", "launcher", "openslide", "deepspeed")
    checks = [Check(name, True, "") for name in names]
    checks += [Check("gpu", False, "no GPU is visible", False), Check("slurm", False, "sbatch not on the PATH", False)]
    lines = list(describe_verdict(verdict(checks)))
    assert lines[0].startswith("ready for CPU training, training with ZeRO, extraction with ")
    assert lines[1:] == [
        "not for GPU training: gpu: no GPU is visible (a driver and a build of torch for CUDA)",
        "not for jobs on SLURM: slurm: sbatch not on the PATH (run it on a node that submits jobs)",
    ]
    first, *_ = describe_verdict(verdict([Check("torch", False, "broken")]))
    assert first == "ready for jobs on SLURM"
