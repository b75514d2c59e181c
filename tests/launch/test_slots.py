"""Who gets which cores and GPUs, and what is tried again how."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.config import Config
from cfusion.errors import ConfigError, PartialResultError, RequeueError
from launch.sweep import execute as sweep
from launch.sweep import workers as local
from launch.sweep.execute import Execution, run_all
from launch.sweep.plan import PlannedRun, SweepConfig, plan
from launch.sweep.work import Job, Outcome
from launch.sweep.workers import Slot, slots_here


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "usable_cores", lambda: 16)


def test_a_machine_without_gpus_shares_out_its_cores(monkeypatch):
    monkeypatch.setattr(local, "visible_gpus", list)
    assert [slot.threads for slot in slots_here(4, 1, 1)] == [4] * 4
    assert [slot.gpus for slot in slots_here(None, 3, 1)] == [None]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [slot.threads for slot in slots_here(4, 1, 1)] == [2] * 4


def test_gpus_are_given_in_turn_with_equal_shares(monkeypatch):
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1", "5"])
    slots = slots_here(None, 2, 1)
    assert [slot.gpus for slot in slots] == ["0", "1", "5"] * 2
    assert {slot.share for slot in slots} == {0.5}
    assert [(slot.gpus, slot.share) for slot in slots_here(None, 1, 3)] == [("0,1,5", 1.0)]
    assert [slot.gpus for slot in slots_here(None, 1, 2)] == ["0,1"]
    with pytest.raises(ConfigError, match="--processes 4: this machine shows 3 GPUs"):
        slots_here(None, 1, 4)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 4), st.integers(1, 30) | st.none())
@settings(deadline=None)
def test_no_gpu_is_promised_more_than_once(gpus, slots_per_gpu, processes, slots):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "usable_cores", lambda: 16)
        patch.setattr(local, "visible_gpus", lambda: [str(i) for i in range(gpus)])
        if processes > gpus:
            with pytest.raises(ConfigError):
                slots_here(slots, slots_per_gpu, processes)
            return
        found = slots_here(slots, slots_per_gpu, processes)
    promised: dict[str, float] = {}
    for slot in found:
        names = str(slot.gpus).split(",")
        assert len(set(names)) == processes
        for name in names:
            promised[name] = promised.get(name, 0) + slot.share
    assert max(promised.values()) <= 1 + 1e-9


def planned(folder: Path, count: int) -> list[PlannedRun]:
    return [
        PlannedRun(f"run{i}", {"seed": str(i)}, Config(seed=i, output=folder / "runs" / f"run{i}"))
        for i in range(count)
    ]


class Fake:
    """An executor with scripted outcomes: for each run, the outcomes of its attempts in order."""

    def __init__(self, answers: dict[str, list[Outcome]]) -> None:
        self.answers = answers
        self.calls: list[tuple[list[str], Execution]] = []

    def __call__(self, jobs, execution, folder, tick):
        names = [run.name for job in jobs for run in job.runs]
        self.calls.append((names, execution))
        for job in jobs:
            for run in job.runs:
                outcome = self.answers[run.name].pop(0)
                if outcome.state == "done":
                    run.config.output.mkdir(parents=True)
                    (run.config.output / "done.json").write_text("{}")
                yield outcome


def outcome(name: str, state: str, cause: str = "", again: str = "no") -> Outcome:
    return Outcome(name, state, cause, again)  # type: ignore[arg-type]


def test_what_is_killed_is_tried_again_and_bad_input_is_not(tmp_path, monkeypatch):
    runs = planned(tmp_path, 3)
    fake = Fake({
        "run0": [outcome("run0", "failed", "killed", "yes"), outcome("run0", "done")],
        "run1": [outcome("run1", "failed", "bad table")],
        "run2": [outcome("run2", "failed", "no memory on the GPU", "exclusive"), outcome("run2", "done")],
    })  # fmt: skip
    monkeypatch.setattr(sweep, "_dispatch", fake)
    with pytest.raises(PartialResultError, match=r"1 of 3 runs failed\. run1: bad table\."):
        run_all(runs, Execution(slots=6, slots_per_gpu=3), tmp_path)
    assert [names for names, _ in fake.calls] == [["run0", "run1", "run2"], ["run0", "run2"]]
    assert (fake.calls[1][1].slots, fake.calls[1][1].slots_per_gpu) == (None, 1)


def test_the_same_cause_is_reported_once(tmp_path, monkeypatch):
    runs = planned(tmp_path, 30)
    monkeypatch.setattr(sweep, "_dispatch", Fake({r.name: [outcome(r.name, "failed", "no table")] for r in runs}))
    with pytest.raises(PartialResultError, match=r"30 of 30 runs failed\. run0 and 29 more: no table\.") as error:
        run_all(runs, Execution(), tmp_path)
    assert error.value.exit_code == 3


def test_what_is_stopped_wants_to_be_started_again(tmp_path, monkeypatch):
    runs = planned(tmp_path, 2)
    fake = Fake({"run0": [outcome("run0", "done")], "run1": [outcome("run1", "stopped", "asked to stop")]})
    monkeypatch.setattr(sweep, "_dispatch", fake)
    with pytest.raises(RequeueError, match="1 of 2 runs are left"):
        run_all(runs, Execution(retries=3), tmp_path)
    assert len(fake.calls) == 1


def test_a_worker_that_dies_before_it_has_its_job_is_reported_and_raises_nothing(files, tmp_path):
    def send(_job):
        raise BrokenPipeError

    def recv():
        raise EOFError

    worker = local._Worker(Slot(1), 1)
    worker._pipe = SimpleNamespace(send=send, recv=recv)
    worker._process = SimpleNamespace(is_alive=lambda: True, join=lambda: None, exitcode=-9)
    (run,) = plan(SweepConfig(name="s", output=tmp_path, base={"cohort": {"table": str(files.table)}}))
    worker.start(Job((run,)))
    (outcome,) = worker.finish(stopping=False)
    assert (outcome.state, outcome.again) == ("failed", "yes")
    assert outcome.cause == "its worker process was killed by signal 9, possibly out of memory"
