"""What SLURM says of a job is reported by its names; what it does not know is not taken for alive."""

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest

from cfusion.cli.options import cores_of
from cfusion.config import validate
from cfusion.errors import ConfigError
from launch.sweep.plan import SweepConfig, plan
from launch.sweep.status import look_in_queue
from launch.sweep.work import Job
from launch.tasks import slurm_array, slurm_states
from launch.tasks.slurm_options import SlurmQueueOptions
from launch.tasks.slurm_states import GONE, JobState, SlurmStates, is_being_ended
from launch.tasks.task import TaskResources

DOWN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
UNKNOWN = "slurm_load_jobs error: Invalid job id specified"
NO_ACCOUNTING = "Slurm accounting storage is disabled"


@pytest.fixture
def answers(fake_slurm, monkeypatch):
    """Sets what squeue and sacct answer: lines, or an error."""
    monkeypatch.setattr(slurm_states, "_SHORTEST", 0.0)
    monkeypatch.setattr(slurm_array, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(slurm_array, "_RESULT_SECONDS", 0.2)

    def answer(squeue: str, sacct: str = NO_ACCOUNTING) -> None:
        for name, text in (("squeue", squeue), ("sacct", sacct)):
            error = text in (DOWN, UNKNOWN, NO_ACCOUNTING)
            script = (
                f"cat >&2 <<'X'\n{text}\nX\nexit 1\n"
                if error
                else f"[ -z \"$SQUEUE_USERS\" ] && cat <<'X'\n{text}\nX\n"
            )
            (fake_slurm / "bin" / name).write_text(f"#!/bin/sh\necho x >> {fake_slurm}/asked\n{script}")
            (fake_slurm / "bin" / name).chmod(0o755)

    answer("")
    return answer


@pytest.mark.parametrize(
    ("squeue", "sacct", "expected"),
    [
        ("77_0|RUNNING|None\n77_1|PENDING|Resources", NO_ACCOUNTING,
         {"77_0": JobState("RUNNING"), "77_1": JobState("PENDING", "Resources")}),
        ("77_0|PENDING|None", "77_0|COMPLETED\n77_1|CANCELLED by 1000",
         {"77_0": JobState("PENDING"), "77_1": JobState("CANCELLED")}),
        (UNKNOWN, "JobID|State|NodeList\n77_[0-1%2]|PENDING|\n77_0.batch|FAILED|n1",
         {"77_0": JobState("PENDING"), "77_1": JobState("PENDING")}),
        ("77_0|OUT_OF_MEMORY|OutOfMemory\n77_1|NODE_FAIL|NodeDown", DOWN,
         {"77_0": JobState("OUT_OF_MEMORY"), "77_1": JobState("NODE_FAIL")}),
        (DOWN, NO_ACCOUNTING, {}),
        ("", NO_ACCOUNTING, {"77_0": JobState(GONE), "77_1": JobState(GONE)}),
        (UNKNOWN, "", {"77_0": JobState(GONE), "77_1": JobState(GONE)}),
    ],
)  # fmt: skip
def test_squeue_then_the_accounting_then_nothing(answers, monkeypatch, squeue, sacct, expected):
    monkeypatch.setenv("SQUEUE_USERS", "somebody")
    answers(squeue, sacct)
    states = SlurmStates()
    for _ in range(3):
        found = states.look(["77_0", "77_1"], now=True)
    assert found == expected
    assert {name: state.ended for name, state in found.items()} == {
        name: state.name not in ("RUNNING", "PENDING") for name, state in expected.items()
    }


def test_a_job_counts_as_gone_only_after_several_answers(answers):
    states = SlurmStates()
    assert [states.look(["77"], now=True) for _ in range(2)] == [{}, {}]
    answers("77|RUNNING|None")
    assert states.look(["77"], now=True)["77"].name == "RUNNING"
    answers("")
    for _ in range(2):
        assert states.look(["77"], now=True)["77"].name == "RUNNING"
    answers(DOWN)
    assert states.look(["77"], now=True) == {}
    answers("")
    assert states.look(["77"], now=True)["77"].name == GONE


@pytest.mark.parametrize(
    "reason",
    ["PartitionConfig", "PartitionTimeLimit", "QOSMaxCpuPerUserLimit", "QOSGrpGRES", "AssocGrpCPUMinutesLimit",
     "BadConstraints",
     "ReqNodeNotAvail, UnavailableNodes:n1", "JobHeldUser", "DependencyNeverSatisfied"],
)  # fmt: skip
def test_a_reason_that_may_never_pass_is_a_warning_once(answers, caplog, reason):
    caplog.set_level(logging.INFO)
    states = SlurmStates()
    answers(f"77_0|PENDING|{reason}\n77_1|PENDING|Priority")
    for _ in range(3):
        states.look(["77_0", "77_1"], now=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"1 PENDING ({reason}), 1 PENDING (Priority); they may wait without end: {reason}" in record.message


def test_while_jobs_wait_a_line_comes_every_minute(answers, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    answers("77_0|PENDING|Priority")
    states = SlurmStates()
    for _ in range(3):
        states.look(["77_0"], now=True)
    assert len(caplog.records) == 1
    monkeypatch.setattr(slurm_states, "_REPORT_SECONDS", 0.0)
    states.look(["77_0"], now=True)
    assert [r.message for r in caplog.records] == ["SLURM: 1 PENDING (Priority)"] * 2
    answers(DOWN)
    states.look(["77_0"], now=True)
    assert "unknown state (SLURM does not answer)" in caplog.records[-1].message


@dataclass(frozen=True)
class Ended:
    name: str
    how: str
    stopped: bool = False
    retry: bool = False


@dataclass(frozen=True)
class Sleeper:
    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def __call__(self):
        return [Ended(self.name, "done")]

    def lost(self, cause, *, stopped=False):
        return [Ended(self.name, f"lost: {cause}")]

    def refused(self, cause):
        return [Ended(self.name, f"refused: {cause}")]


def run(folder: Path) -> dict[str, str]:
    tasks = [Sleeper("a"), Sleeper("b")]
    found = slurm_array.run_slurm(tasks, TaskResources(cpus=1), folder / "jobs", "test", lambda _: None)
    return {result.name: result.how for result in found}


def test_cancelled_tasks_are_reported_and_not_queued_again_and_lost_ones_name_their_state(answers, fake_slurm):
    answers("77_0|CANCELLED|None\n77_1|OUT_OF_MEMORY|OutOfMemory")
    (fake_slurm / "jobs").mkdir()
    (fake_slurm / "jobs" / "77_1_0_log.err").write_text("slurmstepd: error: oom_kill\n")
    assert run(fake_slurm) == {
        "a": "refused: its SLURM task 77_0 was CANCELLED; it wrote no log; the same command queues it again",
        "b": f"lost: its SLURM task 77_1 ended as OUT_OF_MEMORY, see {fake_slurm}/jobs/77_1_0_log.err",
    }


@pytest.mark.parametrize(("state", "named"), [("FAILED", True), ("TIMEOUT", False)])
def test_a_task_whose_setup_failed_names_the_error_of_its_log(answers, fake_slurm, state, named):
    answers(f"77_0|{state}|None\n77_1|CANCELLED|None")
    (fake_slurm / "jobs").mkdir()
    log = fake_slurm / "jobs" / "77_0_0_log.err"
    log.write_text("module: command not found\nerror: --setup 'module load cuda' failed.\n")
    why = " (--setup 'module load cuda' failed)" if named else ""
    assert run(fake_slurm)["a"] == f"lost: its SLURM task 77_0 ended as {state}{why}, see {log}"


def test_a_result_counts_whatever_slurm_says(answers, fake_slurm):
    answers("77_0|CANCELLED|None\n77_1|RUNNING|None")
    (fake_slurm / "jobs").mkdir()
    for number, name in enumerate("ab"):
        path = fake_slurm / "jobs" / f"77_{number}_0_result.pkl"
        path.write_bytes(pickle.dumps(("success", [Ended(name, "done")])))
    assert run(fake_slurm) == {"a": "done", "b": "done"}


def test_a_job_that_slurm_no_longer_knows_is_reported(answers, fake_slurm):
    found = run(fake_slurm)
    assert set(found) == {"a", "b"}
    assert all("is no longer known to SLURM; it wrote no log" in how for how in found.values())
    assert (fake_slurm / "calls").read_text() == "\n"


def test_more_cores_than_a_node_has_are_refused_and_the_default_fits(answers, fake_slurm):
    sinfo = fake_slurm / "bin" / "sinfo"
    sinfo.write_text("#!/bin/sh\necho 'main* 2'; echo 'main* 3+'; echo 'gpu 64'\n")
    sinfo.chmod(0o755)
    with pytest.raises(ConfigError, match=r"--cpus 4: the largest node of the default partition has 3 cores"):
        slurm_array.submit([Sleeper("a")], TaskResources(cpus=4), fake_slurm / "jobs", "test")
    assert not (fake_slurm / "calls").exists()
    assert cores_of(None, "slurm", SlurmQueueOptions()) == 3
    assert cores_of(None, "ray", SlurmQueueOptions()) == 4
    assert cores_of(7, "slurm", SlurmQueueOptions()) == 7


@pytest.mark.parametrize(
    ("squeue", "ended"), [("77_0|COMPLETING|None", True), ("77_0|RUNNING|None", False), (DOWN, False)]
)
def test_a_job_that_slurm_ends_does_not_queue_itself_again(answers, monkeypatch, squeue, ended):
    assert not is_being_ended()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    answers(squeue)
    assert is_being_ended() is ended


def test_the_status_of_a_sweep_says_what_its_open_runs_wait_for(answers, files, fake_slurm):
    base = files.config(fake_slurm / "x").model_dump(mode="json", exclude={"output"})
    values = {"name": "test", "output": str(fake_slurm / "sweep"), "base": base, "axes": {"seed": [1, 2, 3]}}
    runs = plan(validate(SweepConfig, values, "test"))
    jobs = [Job((run,)) for run in runs]
    slurm_array.submit(jobs, TaskResources(cpus=1), fake_slurm / "sweep" / "jobs", "test")
    answers("77_0|PENDING|Priority\n77_1|COMPLETED|None\n77_2|RUNNING|None")
    found = look_in_queue(runs, fake_slurm / "sweep")
    assert {status.state for status in found} == {"open"}
    assert [status.word for status in found] == ["SLURM's job 77: PENDING (Priority)", "", "SLURM's job 77: RUNNING"]
    answers(DOWN)
    assert [status.word for status in look_in_queue(runs, fake_slurm / "sweep")] == [""] * 3


def test_tasks_of_an_earlier_call_that_slurm_no_longer_knows_are_queued_again(answers, fake_slurm):
    tasks = [Sleeper("a"), Sleeper("b")]
    slurm_array.submit(tasks, TaskResources(cpus=1), fake_slurm / "jobs", "test")
    answers("77_0|PENDING|Resources\n77_1|RUNNING|None")
    assert len(slurm_array.queued(tasks, fake_slurm / "jobs")) == 2
    answers(DOWN)
    assert len(slurm_array.queued(tasks, fake_slurm / "jobs")) == 2, "nothing is known"
    answers(UNKNOWN)
    assert slurm_array.queued(tasks, fake_slurm / "jobs") == {}
