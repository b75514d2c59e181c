"""Arrays on a real SLURM of one node: results, cancelled tasks, requeue, pending reasons, a drained node."""

import logging
import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest
from slurm_cluster import Marked, said, slurm_of_one_node, why_not

from cfusion.cli.options import cores_of
from cfusion.errors import ConfigError
from launch.tasks import slurm_array, slurm_states
from launch.tasks.slurm_options import SlurmQueueOptions, most_cores
from launch.tasks.task import TaskResources

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "SLURM")]

NODE = socket.gethostname().partition(".")[0]
PATIENCE = 480


@pytest.fixture(scope="module")
def configuration():
    pytest.importorskip("submitit")
    with slurm_of_one_node() as path:
        yield path


@pytest.fixture
def slurm(configuration, monkeypatch):
    """Makes SLURM's commands ask this cluster, and its jobs find the tests' tasks."""
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    monkeypatch.setattr(slurm_states, "_LONGEST", 2.0)
    monkeypatch.setattr(slurm_array, "_RESULT_SECONDS", 3.0)
    return configuration


class Run(threading.Thread):
    """`run_slurm` in a thread, so that the test can disturb it."""

    def __init__(self, tasks, folder: Path, **resources) -> None:
        super().__init__(daemon=True)
        self.tasks, self.folder = tasks, folder
        self.resources = TaskResources(**{"cpus": 1, "hours": 0.2, **resources})
        self.found: dict[str, str] = {}
        self.start()

    def run(self) -> None:
        for result in slurm_array.run_slurm(self.tasks, self.resources, self.folder / "jobs", "test", lambda _: None):
            self.found[result.name] = result.how

    def result(self) -> dict[str, str]:
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.found

    def job(self) -> str:
        wait_for(lambda: (self.folder / "jobs" / "queue.json").is_file())
        return re.search(r'"(\d+)', (self.folder / "jobs" / "queue.json").read_text())[1]


def wait_for(found, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.1)


def start_again(configuration: Path, job: str, starts: Path) -> None:
    """Start a job that is queued again, which SLURM lets wait for two minutes.

    A node refuses a credential made in the second in which the job's earlier start ended; SLURM then ends the job as
    FAILED ("Job credential revoked"). So the new start comes two seconds later.
    """

    def pending() -> bool:
        return "PENDING" in said(configuration, "squeue", "--noheader", "--format=%T", f"--jobs={job}")

    def started() -> bool:
        if pending():  # SLURM ignores a new time while the job ends
            said(configuration, "scontrol", "update", f"JobId={job}", "StartTime=now")
        return len(starts.read_text().splitlines()) > 1

    wait_for(pending)
    time.sleep(2)
    wait_for(started)


def test_an_array_ends_with_its_results_and_with_the_options_of_the_site(slurm, tmp_path):
    options = SlurmQueueOptions(
        partition="main", extra={"comment": "of the site", "no-kill": ""}, setup=("export CFUSION_TEST_SETUP=site",)
    )
    tasks = [Marked(name, tmp_path) for name in "abc"]
    assert Run(tasks, tmp_path, slurm=options, chunk=2).result() == dict.fromkeys("abc", "done")
    assert {(tmp_path / f"{name}.starts").read_text().split()[1] for name in "abc"} == {"site"}
    job = re.search(r'"(\d+)', (tmp_path / "jobs" / "queue.json").read_text())[1]
    assert "Comment=of the site" in said(slurm, "scontrol", "show", "job", job)


def test_cancelled_tasks_are_reported_and_not_queued_again(slurm, tmp_path):
    run = Run([Marked("a", tmp_path, waits=True), Marked("b", tmp_path, waits=True)], tmp_path, max_parallel=1)
    wait_for((tmp_path / "a.starts").exists)
    job = run.job()
    said(slurm, "scancel", job)
    found = run.result()
    assert all(f"its SLURM task {job}_" in how and "was CANCELLED" in how for how in found.values()), found
    assert (
        len(said(slurm, "squeue", "--states=all", "--noheader", "--name=test", f"--jobs={job}", "-r").split("\n")) == 3
    )


def test_a_task_that_is_warned_saves_and_is_queued_again(slurm, tmp_path):
    run = Run([Marked("a", tmp_path, waits=True)], tmp_path)
    wait_for((tmp_path / "a.starts").exists)
    job = run.job()
    said(slurm, "scancel", "--signal=USR2", job)
    start_again(slurm, job, tmp_path / "a.starts")
    assert run.result() == {"a": "done"}
    assert len((tmp_path / "a.starts").read_text().splitlines()) == 2


def test_at_its_time_limit_a_task_saves_and_goes_on_and_one_that_does_not_is_reported(slurm, tmp_path):
    # 3 minutes: the warning comes 90 s before the end, when the tasks have started also on a busy machine.
    run = Run([Marked("a", tmp_path, waits=True), Marked("b", tmp_path, deaf=True)], tmp_path, hours=0.05)
    wait_for((tmp_path / "b.starts").exists)
    job = run.job()
    start_again(slurm, f"{job}_0", tmp_path / "a.starts")
    found = run.result()
    assert found["a"] == "done"
    assert re.search(rf"its SLURM task {job}_1 ended as TIMEOUT", found["b"]), found


@pytest.mark.skipif(bool(why_not(accounting=True)), reason=why_not(accounting=True) or "accounting")
def test_what_the_controller_has_forgotten_the_accounting_knows(tmp_path, monkeypatch):
    with slurm_of_one_node(accounting=True) as configuration:
        monkeypatch.setenv("SLURM_CONF", str(configuration))
        jobs = []
        for command in ("exit 0", "exit 3", "sleep 600"):
            answer = said(configuration, "sbatch", "--parsable", f"--output={tmp_path}/%j", f"--wrap={command}")
            jobs.append(answer.strip())
        wait_for(lambda: "RUNNING" in said(configuration, "squeue", "--noheader", "--format=%T", f"--jobs={jobs[2]}"))
        said(configuration, "scancel", jobs[2])
        listed = ("squeue", "--noheader", "--states=all", "--format=%i", f"--jobs={','.join(jobs)}")
        wait_for(lambda: not set(said(configuration, *listed).split()) & set(jobs))
        states = slurm_states.SlurmStates(looks_until_gone=1)
        wait_for(lambda: len(states.look(jobs, now=True)) == 3)
        assert [states.look(jobs)[job].name for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED"]
        assert states.look(["999999"], now=True)["999999"].name == slurm_states.GONE


def test_what_no_node_has_is_refused_and_the_default_fits(slurm, tmp_path):
    with pytest.raises(ConfigError, match=r"--cpus 4096: the largest node of the default partition has \d+ cores"):
        slurm_array.submit([Marked("a", tmp_path)], TaskResources(cpus=4096, hours=0.2), tmp_path / "jobs", "test")
    nowhere = TaskResources(cpus=1, hours=0.2, slurm=SlurmQueueOptions(partition="nowhere"))
    with pytest.raises(ConfigError, match=r"sbatch refused the job: .*[Ii]nvalid partition.*Change --cpus"):
        slurm_array.submit([Marked("a", tmp_path)], nowhere, tmp_path / "jobs", "test")
    assert most_cores(None) == most_cores("main") == os.cpu_count()
    assert cores_of(None, "slurm", SlurmQueueOptions()) == min(4, os.cpu_count())


def test_a_drained_node_is_reported_with_the_reason_and_waited_for(slurm, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    said(slurm, "scontrol", "update", f"NodeName={NODE}", "State=DRAIN", "Reason=test")
    try:
        run = Run([Marked("a", tmp_path)], tmp_path)
        wait_for(lambda: re.search(r"SLURM: 1 PENDING \(.+\)", caplog.text))
    finally:
        said(slurm, "scontrol", "update", f"NodeName={NODE}", "State=RESUME")
    assert run.result() == {"a": "done"}


def test_the_script_of_a_dry_run_is_one_that_sbatch_takes(slurm, tmp_path):
    tasks = [Marked(name, tmp_path) for name in "abc"]
    script, elements = slurm_array.array_script(tasks, TaskResources(cpus=1, hours=0.2), tmp_path / "jobs", "test")
    (tmp_path / "script").write_text(script)
    assert elements == 3
    assert "--array=0-2%3" in script
    assert "to start at" in said(slurm, "sbatch", "--test-only", str(tmp_path / "script"))
