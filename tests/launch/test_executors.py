"""The same plan on each executor: the same bytes, whatever is killed or asked to stop on the way."""

import contextlib
import functools
import importlib.util
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
import typer
import yaml
from factories import CohortFiles

from cfusion.cli.cmd_sweep import sweep as sweep_app
from cfusion.config import validate
from cfusion.errors import ConfigError, DataError, MissingExtraError, PartialResultError, RequeueError
from cfusion.interruption import graceful_stop, handling, stop_requested
from cfusion.run_folder import claim, trainer
from launch.sweep import execute as sweeps
from launch.sweep.execute import Execution, run_all
from launch.sweep.markers import attempts
from launch.sweep.plan import PlannedRun, SweepConfig, plan
from launch.sweep.status import look
from launch.sweep.work import Job
from launch.tasks import slurm_array
from launch.tasks.slurm_options import SlurmQueueOptions
from launch.tasks.task import TaskResources

ONE_CORE = TaskResources(cpus=1)
ROOT = Path(slurm_array.__file__).parents[2]


def planned(files: CohortFiles, output: Path, **more) -> list[PlannedRun]:
    base = files.config(output, train={"epochs": 4}).model_dump(mode="json", exclude={"output"})
    axes = {"model": {"amil": {"model.name": "amil"}, "mean": {"model.name": "mean_mil"}}}
    values = {"name": "test", "output": str(output), "base": base, "axes": axes}
    return plan(validate(SweepConfig, {**values, **more}, "test"))


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory) -> list[bytes]:
    """Predictions of the plan, done in workers of this machine without any disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = planned(files, folder)
    run_all(runs, Execution(slots=2), folder)
    return predictions(runs)


def predictions(runs: list[PlannedRun]) -> list[bytes]:
    return [(run.config.output / "predictions.csv").read_bytes() for run in runs]


class Disturbance:
    """Sends a signal, once, to the processes that `find` names, `when`: none: a first fold is done below `folder`."""

    def __init__(
        self, folder: Path, number: int, find: Callable[[], list[int]], when: Callable[[], bool] | None = None
    ) -> None:
        self._number, self._find = number, find
        self._when = when or (lambda: bool(list(folder.glob("runs/*/fold_0/fold.json"))))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.hit: list[int] = []

    def __enter__(self) -> "Disturbance":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set() and not self.hit:
            if self._when():
                for pid in self._find():
                    os.kill(pid, self._number)
                    self.hit.append(pid)
            time.sleep(0.01)


def processes(words: str) -> list[int]:
    """Processes below this one whose command line has the words."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if words in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


def in_submitit(runs: list[PlannedRun], folder: Path, monkeypatch: pytest.MonkeyPatch, **how) -> None:
    monkeypatch.setattr(sweeps, "run_slurm", functools.partial(slurm_array.run_slurm, cluster="local"))
    run_all(runs, Execution("slurm", **{"resources": ONE_CORE, **how}), folder)


@pytest.mark.slow
def test_submitit_ends_with_the_same_bytes_and_a_killed_task_goes_on(files, expected, tmp_path, monkeypatch):
    runs = planned(files, tmp_path)
    both_in_one_task = TaskResources(cpus=1, chunk=2)
    find = functools.partial(processes, "submitit.core._submit")
    with (
        Disturbance(tmp_path, signal.SIGKILL, find) as killed,
        pytest.raises(PartialResultError, match=r"2 of 2 runs failed. .* its SLURM task \d+ was lost"),
    ):
        in_submitit(runs, tmp_path, monkeypatch, retries=0, resources=both_in_one_task)
    assert killed.hit
    assert [status.state for status in look(runs)] == ["failed", "failed"]
    assert "was lost" in look(runs)[0].word
    in_submitit(runs, tmp_path, monkeypatch, resources=both_in_one_task)
    assert predictions(runs) == expected
    assert [status.state for status in look(runs)] == ["done", "done"]


@pytest.mark.slow
def test_a_task_that_is_signalled_saves_and_is_queued_again(files, expected, tmp_path, monkeypatch):
    runs = planned(files, tmp_path)[:1]
    find = functools.partial(processes, "submitit.core._submit")
    with Disturbance(tmp_path, signal.SIGUSR2, find) as asked:
        in_submitit(runs, tmp_path, monkeypatch, retries=0)
    assert asked.hit
    assert predictions(runs) == expected[:1]
    assert [attempt["outcome"] for attempt in attempts(runs[0].config.output)] == ["stopped", "done"]


@pytest.mark.slow
def test_ray_ends_with_the_same_bytes_though_a_worker_is_killed(files, expected, tmp_path):
    pytest.importorskip("ray")
    runs = planned(files, tmp_path)
    with Disturbance(tmp_path, signal.SIGKILL, functools.partial(processes, "ray::_at_place")) as killed:
        run_all(runs, Execution("ray", resources=TaskResources(cpus=1, max_parallel=1), address="local"), tmp_path)
    assert killed.hit
    assert predictions(runs) == expected


def endless(files: CohortFiles, output: Path) -> list[PlannedRun]:
    """Runs that end when they are asked to, and not before."""
    base = files.config(output, train={"epochs": 1_000_000}).model_dump(mode="json", exclude={"output"})
    return planned(files, output, base=base)


def newest_step(run: PlannedRun) -> str:
    return max(path.name for path in run.config.output.glob("checkpoints/fold_0/step_*"))


def stops_and_goes_on(files: CohortFiles, folder: Path, execution: Execution, *signals: int) -> None:
    """Asked to stop by each of the signals, the run at work saves its state, and the other one is not begun."""
    runs = endless(files, folder)
    begun = functools.partial(lambda folder: trainer(folder)[1], runs[0].config.output)
    steps = []
    for number in signals:
        error = KeyboardInterrupt if number == signal.SIGINT else RequeueError
        with Disturbance(folder, number, lambda: [os.getpid()], begun) as asked, pytest.raises(error):
            run_all(runs, execution, folder)
        assert asked.hit
        steps.append(newest_step(runs[0]))
    assert [attempt["outcome"] for attempt in attempts(runs[0].config.output)] == ["stopped", "stopped"]
    assert steps[0] < steps[1], "the second call went on from the state that the first one saved"
    assert not runs[1].config.output.exists()
    assert [status.state for status in look(runs)] == ["open", "open"]


@pytest.mark.long
def test_asked_to_stop_ray_has_the_runs_at_work_save_and_does_not_begin_the_rest(files, tmp_path):
    pytest.importorskip("ray")
    one_at_a_time = Execution("ray", resources=TaskResources(cpus=1, max_parallel=1), address="local")
    stops_and_goes_on(files, tmp_path, one_at_a_time, signal.SIGTERM, signal.SIGINT)


def test_a_signal_while_ray_starts_asks_for_a_stop(files, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")

    def start(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", start)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RequeueError, match="before any task had started"):
        run_all(planned(files, tmp_path), Execution("ray", address="local"), tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before


AFTER_RAY = """
import signal
from cfusion.interruption import graceful_stop, stop_requested
from launch.tasks.slurm_options import SlurmQueueOptions
from launch.tasks.task import TaskResources
from launch.tasks.ray_tasks import run_ray
with graceful_stop():
    list(run_ray([], TaskResources(), "local", print))
    signal.raise_signal(signal.SIGTERM)
    assert stop_requested()
"""


@pytest.mark.long
def test_a_signal_after_ray_has_ended_asks_for_a_stop():
    pytest.importorskip("ray")
    # In a separate process: Ray restores the default signal action, which ends the process.
    ended = subprocess.run([sys.executable, "-c", AFTER_RAY], cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.long
def test_a_run_whose_ray_worker_always_dies_is_tried_as_often_as_asked(files, tmp_path):
    pytest.importorskip("ray")
    run = endless(files, tmp_path)[0]
    killed: set[int] = set()
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.05):
            left, held = trainer(run.config.output)
            if held and left.pid > 0 and left.pid not in killed:
                killed.add(left.pid)
                os.kill(left.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(PartialResultError, match="its Ray task was lost"):
            run_all([run], Execution("ray", resources=ONE_CORE, address="local", retries=1), tmp_path)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    assert [attempt["outcome"] for attempt in attempts(run.config.output)] == ["killed", "killed"]


def test_what_slurm_is_asked_for(files, fake_slurm):
    resources = TaskResources(
        cpus=6, gpus=1, mem_gb=32, hours=1.5, slurm=SlurmQueueOptions(partition="gpu"), max_parallel=5, chunk=2
    )
    jobs = [Job((run,)) for run in planned(files, fake_slurm, axes={"seed": [1, 2, 3, 4, 5]})]
    tasks = slurm_array.submit(jobs, resources, fake_slurm / "jobs", "cfusion-sweep")
    assert [len(part) for part in tasks.values()] == [2, 2, 1]
    assert [task.job_id for task in tasks] == ["77_0", "77_1", "77_2"]
    asked = set((fake_slurm / "asked.sh").read_text().splitlines())
    assert {
        "#SBATCH --array=0-2%3", "#SBATCH --cpus-per-task=6", "#SBATCH --gpus-per-node=1", "#SBATCH --mem=32GB",
        "#SBATCH --time=90", "#SBATCH --job-name=cfusion-sweep", "#SBATCH --partition=gpu", "#SBATCH --signal=USR2@90",
        "#SBATCH --requeue",
    } <= asked  # fmt: skip
    assert not any("--wckey" in line for line in asked), "a site that checks them refuses submitit's"
    (step,) = [line for line in asked if line.startswith("srun ")]
    assert " --cpus-per-task=6 " in step, "srun does not take it from sbatch"


@pytest.mark.parametrize(("line", "code"), [("module load cuda", 2), ("false || true", 0), ("export A=1", 0)])
def test_a_line_of_the_setup_that_fails_ends_the_task_before_its_work(files, fake_slurm, line, code):
    (fake_slurm / "bin" / "srun").write_text(f"#!/bin/sh\ntouch {fake_slurm}/worked\n")
    (run,) = planned(files, fake_slurm, axes={"seed": [1]})
    resources = TaskResources(cpus=1, slurm=SlurmQueueOptions(setup=(line,)))
    slurm_array.submit([Job((run,))], resources, fake_slurm / "jobs", "cfusion-sweep")
    done = subprocess.run(["bash", str(fake_slurm / "asked.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert (fake_slurm / "worked").exists() is (code == 0)
    assert (f"error: --setup {line!r} failed. Mend it" in done.stderr) is (code == 2)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [("time", "Give --hours instead"), ("cpus-per-task", "Give --cpus instead"), ("ntasks", "Leave it out")],
)
def test_an_option_that_follows_from_the_plan_names_what_to_give_instead(files, fake_slurm, key, remedy):
    (run,) = planned(files, fake_slurm, axes={"seed": [1]})
    resources = TaskResources(cpus=1, slurm=SlurmQueueOptions(extra={key: "3"}))
    with pytest.raises(ConfigError, match=rf"{key} follows from the plan\. {remedy}"):
        slurm_array.submit([Job((run,))], resources, fake_slurm / "jobs", "cfusion-sweep")


def test_a_task_logs_what_it_does_and_how_that_went(tmp_path, capsys):
    element = slurm_array.ArrayElement((Recorded("a", tmp_path / "log"), Recorded("b", tmp_path / "log")), threads=1)
    element()
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["begins: a", "a: done", "begins: b", "b: done"]


@dataclass(frozen=True)
class Result:
    name: str
    stopped: bool = False
    retry: bool = False
    word: str = "done"


@dataclass(frozen=True)
class Recorded:
    """A task that raises a signal in its process when it ends, or only records that it ran."""

    name: str
    log: Path
    number: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def __call__(self) -> list[Result]:
        with self.log.open("a") as log:
            log.write(f"{self.name} ")
        if self.number:
            signal.raise_signal(self.number)
        return [Result(self.name)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_between_two_tasks_of_an_array_element_queues_the_element_again(tmp_path, number):
    requeued: list[int] = []
    log = tmp_path / "log"
    element = slurm_array.ArrayElement((Recorded("a", log, number), Recorded("b", log)), threads=1)
    with handling((signal.SIGUSR2,), requeued.append):  # submitit's place
        assert element() == [Result("a")]
    assert requeued == [signal.SIGUSR2]
    assert log.read_text() == "a "
    with handling((signal.SIGUSR2,), requeued.append):
        last = slurm_array.ArrayElement((Recorded("a", log, number),), threads=1)
        assert last() == [Result("a")]
    assert len(requeued) == 1, "a signal after the last task leaves nothing to do"
    with graceful_stop():
        assert stop_requested()


def test_tasks_that_are_still_queued_are_followed_and_not_queued_again(files, fake_slurm):
    jobs = [Job((run,)) for run in planned(files, fake_slurm, axes={"seed": [1, 2, 3]})]
    slurm_array.submit(jobs, ONE_CORE, fake_slurm / "jobs", "cfusion-sweep")
    (fake_slurm / "state").write_text("PENDING")
    assert [task.job_id for task in slurm_array.queued(jobs[:1], fake_slurm / "jobs")] == ["77_0"]
    waiting = slurm_array.queued(jobs[1:], fake_slurm / "jobs")
    assert {task.job_id: part for task, part in waiting.items()} == {"77_1": (jobs[1],), "77_2": (jobs[2],)}
    (fake_slurm / "state").write_text("CANCELLED")
    assert slurm_array.queued(jobs, fake_slurm / "jobs") == {}
    (fake_slurm / "state").write_text("PENDING")
    assert slurm_array.queued(jobs, fake_slurm / "jobs") == {}


@contextlib.contextmanager
def ending(state: Path) -> Iterator[None]:
    """Has SLURM's tasks end after a while, so that who waits for them without end fails and does not hang."""
    timer = threading.Timer(60, state.write_text, ["CANCELLED"])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.slow
def test_asked_to_stop_the_command_leaves_the_array_to_slurm_and_queues_nothing_twice(files, fake_slurm):
    runs = planned(files, fake_slurm)
    state, looked = fake_slurm / "state", fake_slurm / "looked"
    state.write_text("PENDING")
    for _ in range(2):
        looked.unlink(missing_ok=True)
        with (
            ending(state),
            Disturbance(fake_slurm, signal.SIGTERM, lambda: [os.getpid()], looked.exists),
            pytest.raises(RequeueError, match=r"SLURM's job 77 continues\. The same command .* scancel 77 ends"),
        ):
            run_all(runs, Execution("slurm", resources=ONE_CORE), fake_slurm)
        assert (fake_slurm / "calls").read_text() == "\n"
        assert [status.state for status in look(runs)] == ["open", "open"]
    run_all(runs, Execution(slots=1), fake_slurm)
    run_all(runs, Execution("slurm", resources=ONE_CORE), fake_slurm)
    assert (fake_slurm / "calls").read_text() == "\n"


def test_missing_slurm_is_reported(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch was not found\. Run this command on a node that submits jobs"):
        run_all(planned(files, tmp_path), Execution("slurm"), tmp_path)


def test_a_missing_ray_cluster_is_reported(files, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(DataError, match=r"no Ray cluster at 127\.0\.0\.1:1\. Start one with ray start"):
        run_all(planned(files, tmp_path), Execution("ray", address="127.0.0.1:1"), tmp_path)


@pytest.mark.parametrize("address", ["bogus", "host:99999", "ray://host", "http://host:8265", ""])
def test_the_error_for_an_invalid_ray_address_shows_valid_ones(files, tmp_path, monkeypatch, address):
    pytest.importorskip("ray")
    message = (
        rf"={re.escape(address)} is not the address of a Ray cluster\. Give HOST:6379, ray://HOST:10001, auto .* local"
    )
    with pytest.raises(ConfigError, match=f"--ray-address{message}"):
        run_all(planned(files, tmp_path), Execution("ray", address=address), tmp_path)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS{message}"):
            run_all(planned(files, tmp_path), Execution("ray", address="auto"), tmp_path)


def test_the_job_for_kuberay_asks_for_what_its_workers_have():
    path = ROOT / "launch" / "kubernetes" / "sweep_rayjob.yaml"
    job = yaml.safe_load(path.read_text())
    command = shlex.split(shlex.split(job["spec"]["entrypoint"])[2].partition("&&")[2])
    assert command[:3] == ["cfusion", "sweep", "run"]
    known = {
        option for parameter in typer.main.get_command(sweep_app).commands["run"].params for option in parameter.opts
    }
    assert {word for word in command if word.startswith("--")} <= known
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    mounts = [pod["template"]["spec"]["containers"][0]["volumeMounts"] for pod in pods]
    assert all(mount == mounts[0] for mount in mounts)
    assert shlex.split(shlex.split(job["spec"]["entrypoint"])[2])[1] == mounts[0][0]["mountPath"]
    worker = pods[1]["template"]["spec"]["containers"][0]["resources"]
    assert command[command.index("--cpus") + 1] == worker["requests"]["cpu"]
    assert command[command.index("--gpus") + 1] == worker["limits"]["nvidia.com/gpu"]


def test_a_folder_too_long_for_rays_sockets_is_named(files, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")

    def init(**_):
        raise OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /scratch/…")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        DataError, match=r"Ray cannot start or join local: .*AF_UNIX.*\. Set RAY_TMPDIR to a short path"
    ):
        run_all(planned(files, tmp_path), Execution("ray", address="local"), tmp_path)


@pytest.mark.parametrize(("executor", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_executor_that_is_not_installed_is_named(files, tmp_path, monkeypatch, executor, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"{package}, which is not installed. Install .*cfusion\[{executor}\]"):
        run_all(planned(files, tmp_path), Execution(executor), tmp_path)


@pytest.mark.slow
def test_torchrun_inside_a_run(files, expected, tmp_path):
    runs = planned(files, tmp_path)[:1]
    run_all(runs, Execution(processes=2), tmp_path)
    single, together = (pd.read_csv(io.BytesIO(text)) for text in (expected[0], predictions(runs)[0]))
    assert together["case_id"].tolist() == single["case_id"].tolist()
    assert together["risk"].to_numpy() == pytest.approx(single["risk"].to_numpy(), abs=1e-3)
    cost = attempts(runs[0].config.output)[-1]
    assert cost["outcome"] == "done"
    assert cost["cpu_s"] > 1


@pytest.mark.slow
def test_torchrun_reports_the_cause_of_a_failure(files, tmp_path):
    runs = planned(files, tmp_path, axes={"encoder": {"uni": {"data.encoder": "uni"}}})
    with pytest.raises(PartialResultError, match=r"holds embeddings of made-up, expected data\.encoder=uni"):
        run_all(runs, Execution(processes=2), tmp_path)


@pytest.mark.slow
def test_asked_to_stop_the_runs_at_work_save_and_the_rest_is_not_begun(files, tmp_path):
    stops_and_goes_on(files, tmp_path, Execution(slots=1), signal.SIGTERM, signal.SIGTERM)


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_left_to_it(files, tmp_path):
    runs = planned(files, tmp_path)
    with claim(runs[0].config.output):
        assert look(runs)[0].state == "running"
        with pytest.raises(
            PartialResultError, match=rf"1 of 2 runs are left to another sweep.*process {os.getpid()} on"
        ):
            run_all(runs, Execution(), tmp_path)
    assert [status.state for status in look(runs)] == ["open", "done"]


@pytest.mark.slow
def test_two_sweeps_at_once_train_every_run_once(files, expected, tmp_path):
    runs = planned(files, tmp_path)
    messages: list[str] = []

    def other() -> None:
        try:
            run_all(runs, Execution(), tmp_path)
        except PartialResultError as error:
            messages.append(error.message)

    second = threading.Thread(target=other)
    second.start()
    try:
        run_all(runs, Execution(), tmp_path)
    except PartialResultError as error:
        messages.append(error.message)
    second.join()
    assert all("left to another sweep" in message for message in messages)
    assert predictions(runs) == expected
    assert [len(attempts(run.config.output)) for run in runs] == [1, 1]


def test_the_lock_of_a_dead_process_is_taken_over(files, tmp_path):
    run = planned(files, tmp_path)[0]
    folder = run.config.output
    pid = os.fork()
    if pid == 0:
        with claim(folder):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    left, held = trainer(folder)
    assert (left.pid, held) == (pid, False)
    status = look([run])[0]
    assert status.state == "failed"
    assert f"process {pid} on" in status.word
    assert "killed" in status.word
    with claim(folder):
        assert trainer(folder)[1]
    assert look([run])[0].state == "open"
