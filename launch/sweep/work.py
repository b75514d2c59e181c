"""One job in a worker: a run, or several that share one read. It is locked, trained and reported."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from cfusion.child_processes import child_environment, python_command
from cfusion.errors import CfusionError, DataError, RequeueError
from cfusion.files import write_text
from cfusion.locks import HeldError
from cfusion.run_folder import claim, is_done
from cfusion.secret_text import SecretsLeftOut
from launch.sweep.cost import Meter
from launch.sweep.data_digests import DataDigests
from launch.sweep.markers import LOG, add_attempt, clear_failure, write_failure
from launch.sweep.plan import PlannedRun
from launch.tasks.task import cause_of

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a run went.

    Attributes:
        name: The run.
        state: `held`: another process trains it; `stopped`: stopped on request, its state is saved.
        cause: Why it is not done, in one line.
        again: Whether another attempt may succeed: `no` if the input is invalid; `exclusive`: on an unshared GPU,
            because its share of one was too small.
    """

    name: str
    state: Literal["done", "failed", "stopped", "held"]
    cause: str = ""
    again: Literal["no", "yes", "exclusive"] = "no"

    @property
    def stopped(self) -> bool:
        """Whether the same run resumes where it stopped."""
        return self.state == "stopped"

    @property
    def retry(self) -> bool:
        """Whether another attempt may succeed."""
        return self.again != "no"

    @property
    def word(self) -> str:
        """How it went, in one line."""
        return f"{self.state}: {self.cause}" if self.cause else self.state


@dataclass(frozen=True)
class Job:
    """What one worker does at a time; a task of `launch.tasks`.

    Attributes:
        runs: One run, or several that share one read of the shards.
        processes: Processes of each run; more than one are started by torchrun.
        share: Fraction of its GPUs that the worker may fill.
    """

    runs: tuple[PlannedRun, ...]
    processes: int = 1
    share: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the runs."""
        return tuple(run.name for run in self.runs)

    def __call__(self) -> list[Outcome]:
        """Do the runs that are neither done nor held by another process; mark failed ones with the cause."""
        outcomes: list[Outcome] = []
        data = DataDigests({})
        with contextlib.ExitStack() as held:
            mine: list[PlannedRun] = []
            locks: list[tuple[int, ...]] = []
            for run in self.runs:
                try:
                    lock = held.enter_context(claim(run.config.output))
                except HeldError as error:
                    outcomes.append(Outcome(run.name, "held", error.message))
                    continue
                if is_done(run.config.output):
                    outcomes.append(Outcome(run.name, "done"))
                    continue
                clear_failure(run.config.output)
                if changed := run.changed(data):
                    outcomes.append(_refused(run, changed))
                    continue
                mine.append(run)
                locks.append(lock)
            return outcomes + (_attempt(self, mine, locks) if mine else [])

    def lost(self, cause: str, *, stopped: bool = False) -> list[Outcome]:
        """Return how the runs went if the worker ended without reporting; mark those that are not done."""
        return [_lost(run, cause, stopped) for run in self.runs]

    def refused(self, cause: str) -> list[Outcome]:
        """Return that the runs cannot start where they were sent."""
        return [Outcome(run.name, "failed", cause) for run in self.runs]


def _lost(run: PlannedRun, cause: str, stopped: bool) -> Outcome:
    folder = run.config.output
    if is_done(folder):
        return Outcome(run.name, "done")
    if stopped:
        return Outcome(run.name, "stopped", "asked to stop")
    try:
        with claim(folder):
            add_attempt(folder, {"outcome": "killed"})
            write_failure(folder, cause)
    except HeldError as error:
        return Outcome(run.name, "held", error.message)
    return Outcome(run.name, "failed", cause, "yes")


def _refused(run: PlannedRun, cause: str) -> Outcome:
    """Mark a run that cannot start as failed; another attempt would fail too."""
    with _logged_to([run.config.output]) as log:
        log.error("%s", cause)
    write_failure(run.config.output, cause)
    return Outcome(run.name, "failed", cause)


def _attempt(job: Job, runs: list[PlannedRun], locks: list[tuple[int, ...]]) -> list[Outcome]:
    """Train the runs; record the attempt and its cost with each of them."""
    meter = Meter(job.share, len(runs))
    missed = Outcome("", "failed", "ended without being marked as done")
    with _logged_to([run.config.output for run in runs]) as log:
        try:
            _train(job, runs, locks)
        except RequeueError as error:
            log.info("%s", error.message)
            missed = Outcome("", "stopped", error.message)
        except CfusionError as error:
            log.error("%s", error)
            missed = Outcome("", "failed", str(error))
        except Exception as error:  # noqa: BLE001 - a worker reports any cause; the sweep then fails
            log.error("%s", traceback.format_exc())
            missed = Outcome(
                "", "failed", cause_of(error), "exclusive" if _out_of_memory(error) and job.share < 1 else "yes"
            )
        cost = meter.read()
        log.info("ended after %.0f s", cost["wall_s"])
    outcomes = []
    for run in runs:
        done = is_done(run.config.output)
        outcome = Outcome(run.name, "done") if done else Outcome(run.name, missed.state, missed.cause, missed.again)
        add_attempt(run.config.output, {"outcome": outcome.state, **cost})
        if outcome.state == "failed":
            write_failure(run.config.output, outcome.cause)
        outcomes.append(outcome)
    return outcomes


def _out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _train(job: Job, runs: list[PlannedRun], locks: list[tuple[int, ...]]) -> None:
    from cfusion.runs.crossval import cross_validate, cross_validate_together

    if job.processes > 1:
        for run, lock in zip(runs, locks, strict=True):
            _torchrun(run, job.processes, lock)
    elif len(runs) > 1:
        cross_validate_together([run.config for run in runs], same_code=runs[0].same_code)
    else:
        cross_validate(runs[0].config, same_code=runs[0].same_code)


def _torchrun(run: PlannedRun, processes: int, lock: tuple[int, ...]) -> None:
    """Train a run in several processes; they hold its lock too, so it stays held if this process is killed."""
    from cfusion.interruption import graceful_stop, stop_requested

    folder = run.config.output
    planned = folder / "planned.yaml"
    write_text(planned, yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
    command = [*python_command(), "-m", "launch.torchrun", "--standalone", "--nproc-per-node", str(processes)]
    same_code = [] if run.same_code is None else ["--same-code", run.same_code]
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", processes)) // processes)
    with (folder / LOG).open("ab") as log, graceful_stop():
        start = log.tell()
        child = subprocess.Popen(
            [*command, "-m", "cfusion", "train", str(planned), *same_code], stdout=log, stderr=subprocess.STDOUT,
            pass_fds=lock, env={**child_environment(), "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        asked = False
        try:
            while child.poll() is None:
                if stop_requested() and not asked:
                    child.terminate()
                    asked = True
                time.sleep(_POLL_SECONDS)
        finally:
            # The lock ends with this block, even if another process has its descriptor: the child must not outlive it.
            if child.poll() is None:
                child.terminate()
                child.wait()
    if not is_done(folder):
        if asked or child.returncode == RequeueError.exit_code:
            raise RequeueError("asked to stop; its state is saved.")
        with (folder / LOG).open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            if line.startswith("error: "):
                raise DataError(line.removeprefix("error: "))
        raise ChildProcessError(f"torchrun ended with exit code {child.returncode}; its log has the last lines")


@contextlib.contextmanager
def _logged_to(folders: Sequence[Path]) -> Iterator[logging.Logger]:
    """Within the block, write the program's log to `run.log` in each folder."""
    log = logging.getLogger("cfusion")
    level = log.level
    handlers = [logging.FileHandler(folder / LOG) for folder in folders]
    log.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(SecretsLeftOut("%(asctime)s %(message)s"))
        log.addHandler(handler)
    try:
        yield log
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
