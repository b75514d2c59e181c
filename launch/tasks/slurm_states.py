"""States of SLURM's jobs, as SLURM names them: from squeue, and from sacct where the cluster has accounting.

squeue knows what is queued, running or has ended in the last minutes. Only if it answers and does not name a job, and
sacct does not either, SLURM no longer knows the job. If neither answers, nothing is known, and nothing is concluded.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
})  # fmt: skip
"""States of jobs that do not run again; one that SLURM queues again is PENDING or REQUEUED."""

GONE = "GONE"
"""State of a job that SLURM does not know; not a name of SLURM's."""

_NEVER = re.compile(
    r"Partition(Config|NodeLimit|TimeLimit|Down|Inactive)|BadConstraints|DependencyNeverSatisfied|JobHeld|Invalid|"
    r"QOS(Not|Max|Grp|.*Limit)|Assoc(Max|Grp|.*Limit)|Licenses|ReqNodeNotAvail|Reservation|launch failed|MaxCpu|MaxMem"
)
"""Reasons with which a job may wait without end, unless the job, a limit or the cluster changes."""

_RANGE = re.compile(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]")
_SHORTEST, _LONGEST = 2.0, 30.0
_LOOKS_UNTIL_GONE = 3
_REPORT_SECONDS = 60.0
_ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class JobState:
    """State of a job.

    Attributes:
        name: SLURM's name for it, such as PENDING; `GONE` if SLURM does not know the job.
        reason: Why it is pending, as squeue says; empty otherwise.
    """

    name: str
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job will not run again."""
        return self.name in ENDED or self.name == GONE

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


class SlurmStates:
    """Looks at jobs, more rarely the longer they last, and reports what they wait for.

    Args:
        looks_until_gone: Answers without a job after which SLURM counts as no longer knowing it.
    """

    def __init__(self, looks_until_gone: int = _LOOKS_UNTIL_GONE) -> None:
        self._until_gone = looks_until_gone
        self._states: dict[str, JobState] = {}
        self._missed: Counter[str] = Counter()
        self._started = time.monotonic()
        self._looked = self._reported = float("-inf")
        self._line = ""
        self._answered = True

    def look(self, jobs: Sequence[str], *, now: bool = False) -> dict[str, JobState]:
        """Return the known states of jobs, such as `4711_0`; `now`: ask SLURM even if the last answer is recent."""
        pause = min(_LONGEST, max(_SHORTEST, (time.monotonic() - self._started) / 10))
        if now or time.monotonic() - self._looked >= pause:
            self._ask(jobs)
            self._looked = time.monotonic()
            self._report(jobs)
        return {job: self._states[job] for job in jobs if job in self._states}

    def _ask(self, jobs: Sequence[str]) -> None:
        answered, found = _squeue(jobs)
        self._answered = answered
        missing = [job for job in jobs if job not in found]
        if missing:
            found |= {job: state for job, state in _sacct(missing).items() if job in missing}
        for job in jobs:
            if job in found:
                self._states[job] = found[job]
                del self._missed[job]
            elif answered:
                self._missed[job] += 1
                if self._missed[job] >= self._until_gone:
                    self._states[job] = JobState(GONE)
        if not answered and not found:
            logger.debug("SLURM does not answer")
            for job in jobs:
                self._states.pop(job, None)

    def _report(self, jobs: Sequence[str]) -> None:
        """Log how many jobs are in which state: when that changes, and every minute."""
        known = [self._states.get(job) for job in jobs]
        counts = Counter(self._words(state) for state in known)
        line = ", ".join(f"{number} {words}" for words, number in counts.most_common())
        if line == self._line and time.monotonic() - self._reported < _REPORT_SECONDS:
            return
        never = {s.reason for s in known if s is not None and s.name == "PENDING" and _NEVER.search(s.reason)}
        level = logging.WARNING if never and line != self._line else logging.INFO
        note = f"; they may wait without end: {', '.join(sorted(never))}" if never else ""
        logger.log(level, "SLURM: %s%s", line, note)
        self._line, self._reported = line, time.monotonic()

    def _words(self, state: JobState | None) -> str:
        if state is None:
            return "not listed" if self._answered else "of unknown state (SLURM does not answer)"
        if state.name == GONE:
            return "no longer known to SLURM"
        return str(state)


def states_now(jobs: Sequence[str]) -> dict[str, JobState]:
    """Return the states of the jobs, such as `4711_0`, that squeue knows; none if it does not answer."""
    _, found = _squeue(jobs)
    return {job: found[job] for job in jobs if job in found}


def jobs_of_script(path: Path) -> dict[str, str]:
    """Return SLURM's names for the states of this user's jobs of a script that are queued or run; none if unknown."""
    _, out, _ = _asked(["squeue", "--me", "--noheader", "--format=%i|%T|%o"])
    wanted = str(path.absolute())
    return {job: state for job, state, script in _rows(out, 3) if script == wanted and state not in ENDED}


def is_being_ended() -> bool:
    """Return whether SLURM ends the job of this process, as after scancel or a preemption; False outside a job.

    SLURM then queues the job again itself, or not at all.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    _, found = _squeue([job])
    return any(state.ended or state.name == "COMPLETING" for state in found.values())


def _squeue(jobs: Sequence[str]) -> tuple[bool, dict[str, JobState]]:
    """Return whether squeue answered, and the states of the jobs that it knows."""
    arrays = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    code, out, problem = _asked(
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={arrays}"]
    )
    if code:
        return "Invalid job id" in problem, {}
    states = {}
    for job, name, reason in _rows(out, 3):
        states[job] = JobState(name, "" if name != "PENDING" or reason == "None" else reason)
    return True, states


def _sacct(jobs: Sequence[str]) -> dict[str, JobState]:
    """Return the states of the jobs that the accounting knows; nothing where there is none."""
    arrays = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    _, out, _ = _asked(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", "-j", arrays])
    # "CANCELLED by 1000" names the user.
    return {job: JobState(name.split()[0]) for job, name in _rows(out, 2) if name}


def _rows(text: str, columns: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        job, *rest = [part.strip() for part in line.split("|")]
        if len(rest) < columns - 1 or not job[:1].isdigit():
            continue
        for name in _jobs(job):
            yield [name, *rest[: columns - 1]]


def _jobs(text: str) -> Iterable[str]:
    """Return the jobs of `4711_[0-3,7%2]`; a single one is itself."""
    found = _RANGE.fullmatch(text)
    if found is None:
        return [text]
    names = []
    for part in found[2].split(","):
        first, _, last = part.partition("-")
        names += [f"{found[1]}_{number}" for number in range(int(first), int(last or first) + 1)]
    return names


def _asked(command: list[str]) -> tuple[int, str, str]:
    """Run a command of SLURM; returns exit code, output and errors. Without it, the code is that of a shell."""
    # Variables such as SQUEUE_USERS are options too, and would hide jobs.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=_ANSWER_SECONDS
        )
    except FileNotFoundError:
        return 127, "", f"{command[0]} was not found"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]} did not answer in {_ANSWER_SECONDS:.0f} s"
    return done.returncode, done.stdout, done.stderr
