"""What a sweep writes beside a run: who trains it, how its attempts went and what they cost, and why it failed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from cfusion.errors import CfusionError
from cfusion.files import read_json, write_json

LOCK, ATTEMPTS_FILE, FAILED, LOG = "run.lock", "attempts.json", "failed.json", "run.log"

_TRIES, _PAUSE_SECONDS = 20, 0.05


class HeldError(CfusionError):
    """Another process trains this run."""


@dataclass(frozen=True)
class Holder:
    """The process that trains a run, or that did when it was killed.

    Attributes:
        host: Its machine.
        pid: Its number there.
        since: Start of the attempt, seconds since 1970.
    """

    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[int]:
    """Hold a run while the block lasts; yields the lock's descriptor.

    The lock is the system's own (flock), which frees it when its last holder ends, however that happens, so a dead
    process leaves nothing to clear. A child that is given the descriptor holds the run too.

    Raises:
        HeldError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        # A look at the lock (see `holder`) takes it for an instant, which must not count as a holder.
        for _ in range(_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_PAUSE_SECONDS)
        else:
            raise HeldError(f"{folder.name}: {_named(file) or 'another process'} trains it.", "Leave it, or end that.")
        file.truncate(0)
        file.write(json.dumps(asdict(Holder(socket.gethostname(), os.getpid(), time.time()))))
        file.flush()
        yield file.fileno()
        file.truncate(0)


def holder(folder: Path) -> tuple[Holder | None, bool]:
    """Who trains a run, or was killed in it, and whether that process still holds it."""
    try:
        file = (folder / LOCK).open(encoding="utf-8")
    except OSError:
        return None, False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _named(file) or Holder("an unknown host", 0, time.time()), True
        return _named(file), False


def _named(file: IO[str]) -> Holder | None:
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts at a run, oldest first: `outcome`, and its cost (see `launch.sweep.cost`) unless it was killed."""
    path = folder / ATTEMPTS_FILE
    return read_json(path) if path.is_file() else []


def add_attempt(folder: Path, attempt: dict[str, Any]) -> None:
    """Record one more attempt."""
    write_json(folder / ATTEMPTS_FILE, [*attempts(folder), attempt])


def write_failure(folder: Path, cause: str) -> None:
    """Mark a run as failed, for this cause; its log has the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    told = " ".join(cause.split())
    write_json(folder / FAILED, {"cause": told, "log": LOG, "attempts": len(attempts(folder)), "at": time.time()})


def read_failure(folder: Path) -> dict[str, Any] | None:
    """The failure of a run: `cause`, `log`, `attempts`, `at`; None where it has not failed."""
    path = folder / FAILED
    return read_json(path) if path.is_file() else None


def clear_failure(folder: Path) -> None:
    """Take the mark away: the run is tried again."""
    (folder / FAILED).unlink(missing_ok=True)
