"""A run's folder has one writer; processes do not outlive the launcher that started them."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import yaml
from elastic_run import WORKER
from factories import CohortFiles, make_cohort

from cfusion import run_folder
from cfusion.child_processes import PARENT, stop_with_parent
from cfusion.errors import RequeueError
from cfusion.files import atomic_path, remove_orphans
from cfusion.interruption import graceful_stop, stop_requested
from cfusion.locks import HeldError
from cfusion.run_folder import LOCK, claim, trainer
from cfusion.runs import crossval
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run
from cfusion.tracking.journal import read_records
from cfusion.training.world import join_world

HOLD = """
import sys
from pathlib import Path
from cfusion.run_folder import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=24)


@pytest.fixture
def other(tmp_path):
    """Another process that trains the run in `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "a-launch"},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("folds", ["separate", "together"])
def test_a_second_start_is_refused_with_the_process_that_trains(files, tmp_path, other, folds):
    config = files.config(tmp_path / "run", train={"folds": folds})
    with pytest.raises(HeldError, match=rf"run: process {other.pid} on .* trains it\. Wait for it"):
        cross_validate(config)
    assert [path.name for path in config.output.iterdir()] == [LOCK]


def test_a_dead_process_holds_nothing_and_the_end_of_a_run_frees_its_folder(files, tmp_path, other, monkeypatch):
    other.kill()
    other.wait()

    def stopped(runtime, run, parent, bar):
        assert trainer(run.folder)[1]
        with claim(run.folder, nested=True):
            pass
        assert trainer(run.folder)[1]
        raise RequeueError("stopped")

    monkeypatch.setattr(crossval, "_train_folds", stopped)
    with pytest.raises(RequeueError):
        cross_validate(files.config(tmp_path / "run"))
    assert trainer(tmp_path / "run") == (None, False)


def test_a_process_of_the_same_launch_takes_over_from_a_lost_node(tmp_path, other, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another-launch")
    with pytest.raises(HeldError), claim(tmp_path / "run"):
        pass
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-launch")
    with claim(tmp_path / "run"):
        pass


def test_a_lock_of_this_process_is_one_only_for_what_it_starts(tmp_path):
    with claim(tmp_path):
        with pytest.raises(HeldError), claim(tmp_path):
            pass
        with claim(tmp_path, nested=True):
            pass


def test_the_end_of_the_parent_asks_for_a_stop(monkeypatch):
    monkeypatch.setenv(PARENT, "1")
    with graceful_stop():
        stop_with_parent()
        assert stop_requested(), "process 1 is not the parent: it has ended"
    assert PARENT not in os.environ, "the children of this process have another parent"
    with graceful_stop():
        stop_with_parent()
        stop_with_parent(os.getppid())
        assert not stop_requested()


def test_another_torch_that_continues_a_run_is_remarked_once(files, tmp_path, caplog):
    config = files.config(tmp_path / "run")
    runtime = join_world(config.parallel)
    Run.open(runtime, config)
    marker = run_folder.read_marker(config.output)
    marker["provenance"]["packages"]["torch"] = "1.0"
    (config.output / run_folder.RUN).write_text(json.dumps(marker))
    for times in (1, 1):
        Run.open(runtime, config)
        assert caplog.text.count("other versions continue this run") == times
    assert "torch (1.0 there, " in caplog.text
    assert len(run_folder.read_marker(config.output)["continued_by"]) == 1


@pytest.mark.slow
def test_processes_end_with_their_killed_agent_and_one_process_goes_on(files, tmp_path):
    config = files.config(
        tmp_path / "run", train={"epochs": 8, "patience": None, "micro_batch": 1}, splits={"folds": 2},
        tracking={"enabled": True},
    )  # fmt: skip
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node", "2", "--monitor-interval",
               ".1", str(WORKER), str(study), ".1", "0"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("wb")
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as agent:
        wait_for(lambda: list(config.output.glob("checkpoints/*/step_*")))
        workers = psutil.Process(agent.pid).children()
        agent.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    steps = {path.name for path in config.output.glob("checkpoints/*/step_*")}
    assert steps
    one_process = [sys.executable, "-m", "cfusion", "-v", "train", str(study)]
    calm = [*one_process, f"output={tmp_path / 'calm'}", "tracking.enabled=false"]
    for start in (one_process, calm):
        assert subprocess.call(start, stdout=log, stderr=log, env=environment) == 0
    log.close()
    resumed, undisturbed = (
        pd.read_csv(folder / run_folder.PREDICTIONS).set_index("case_id").sort_index()
        for folder in (config.output, tmp_path / "calm")
    )
    pd.testing.assert_frame_equal(resumed, undisturbed, rtol=1e-4, atol=1e-6)
    assert run_folder.is_done(config.output)
    started = [
        record["run"] for record, _ in read_records(config.output / "tracking.jsonl") if record["kind"] == "start"
    ]
    assert sorted(started) == ["", "fold_0", "fold_1"]
    assert "Traceback" not in (tmp_path / "log").read_text()


def wait_for(found, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_a_killed_process_left_half_written_goes_and_what_a_living_one_writes_stays(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cfusion.files import atomic_path, remove_orphans\n"
        "folder = Path(sys.argv[1])\n"
        "with atomic_path(folder / 'fold_2') as fold, atomic_path(folder / 'fold_1' / 'history.csv') as file:\n"
        "    fold.mkdir(); (fold / 'predictions.csv').touch(); file.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob(".*.tmp"))) == 2
    with atomic_path(tmp_path / "of this process") as own:
        own.touch()
        remove_orphans(tmp_path)
        assert list(tmp_path.rglob(".*.tmp")) == [own]
