"""A user's files in the working folder are not run in place of the program."""

import subprocess
import sys
from pathlib import Path

import pytest

from cfusion import child_processes
from cfusion.child_processes import ROOT, child_environment, python_command
from launch.cluster.cluster_plan import LaunchResources, make_plan

NAMES = ("launch.py", "preprocess.py", "typer.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with files of generic names, which leave a mark when they are run."""
    for name in NAMES:
        (tmp_path / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\n")
    return tmp_path


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH stands for the installation: it comes after the working folder, as site-packages does.
    environment = {**child_environment(ends_with_this=False)}
    del environment["PYTHONSAFEPATH"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.slow
def test_the_command_line_takes_its_own_packages(folder):
    done = start([sys.executable, "-m", "cfusion", "sweep", "plan", "nothing.yaml"], folder)
    assert done.returncode == 2, done.stderr
    assert "nothing.yaml" in done.stderr
    assert not (folder / "executed").exists()


@pytest.mark.slow
def test_what_the_program_starts_takes_its_own_packages(folder, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("")
    plan = make_plan(study, [], LaunchResources(gpus=0), python=sys.executable)
    agent = plan.agent(endpoint="127.0.0.1:1", run_id="x")
    assert agent[:4] == [sys.executable, "-P", "-m", "launch.torchrun"]
    assert str(ROOT) in plan.environment()["PYTHONPATH"].split(":")
    done = start([*agent[:4], "--help"], folder)
    assert done.returncode == 0, done.stderr
    assert "--nproc" in done.stdout
    inner = "import launch.tasks.task, preprocess.names, multiprocessing, sys; print(sys.flags.safe_path)"
    assert start([*python_command(), "-c", inner], folder).stdout == "True\n"
    assert not (folder / "executed").exists()


def test_the_folder_of_the_program_itself_stays_importable(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", "/lib"])
    child_processes.forget_working_folder()
    assert sys.path == ["", "/lib"]
    monkeypatch.chdir("/")
    child_processes.forget_working_folder()
    assert sys.path == ["/lib"]
