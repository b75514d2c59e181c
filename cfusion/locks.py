"""One lock for all that a single process may do at a time in a folder.

The lock is the system's (flock, by filelock): it is free when its last holder has ended, also by kill -9. Where the
file system has no flock, a file that names host and process stands for it; one of a dead process on the same host is
taken over, one of another host is not.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock, SoftFileLock, Timeout

from cfusion.console import waiting_for
from cfusion.errors import CfusionError

logger = logging.getLogger(__name__)

_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_INSTANT = 1.0
"""Seconds that a look at the lock (see `holder`), which takes it for an instant, is waited for."""
_POLL_SECONDS = 0.02
_LOOKS = 3


class HeldError(CfusionError):
    """Another process holds the lock."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, or that held it when it was killed.

    Attributes:
        host: Its machine.
        pid: Its number there.
        since: When it took the lock, seconds since 1970.
        launch: Name of the launch that started it, if a launcher did (see `launch_name`).
        job: SLURM's job that it belongs to, such as 4711_0, if it does.
    """

    host: str
    pid: int
    since: float
    launch: str = ""
    job: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (SLURM's job {self.job})" if self.job else "")


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = False, keep: bool = True) -> Iterator[tuple[int, ...]]:
    """Hold the lock file `path` while the block lasts; its folder is made.

    Args:
        path: Lock file; it names the holder while there is one.
        wait: Wait for another holder without end instead of refusing.
        keep: Leave the empty lock file behind; otherwise it is deleted while the lock is still held, and its folder
            afterwards if the lock has made it and nothing else is in it.

    Yields:
        Descriptors; a child process that is given them holds the lock too. None where the file system has no flock.

    Raises:
        HeldError: Another process holds it; the message is that process.
    """
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptors: list[int] = []
    with contextlib.ExitStack() as stack:
        if made and not keep:
            stack.callback(_remove_empty, path.parent)
        try:
            try:
                lock: FileLock | SoftFileLock = FileLock(
                    path, timeout=-1 if wait else _INSTANT, poll_interval=_POLL_SECONDS, fallback_to_soft=False,
                    mode=mode_like(path.parent), on_acquired=descriptors.append,
                )  # fmt: skip
                with waiting_for(f"the lock {path}, held by {named(path) or 'another process'}"):
                    stack.enter_context(lock)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                _warn_once(error.strerror)
                lock = SoftFileLock(_marker(path), timeout=-1 if wait else _INSTANT, poll_interval=_POLL_SECONDS)
                with waiting_for(f"the lock {path}"):
                    stack.enter_context(lock)
        except Timeout:
            raise HeldError(str(named(path) or "another process"), "Wait for it, or end it.") from None
        # Not replaced: another file of this name would be another lock.
        who = Holder(socket.gethostname(), os.getpid(), time.time(), launch_name(), slurm_job())
        path.write_text(json.dumps(asdict(who)), encoding="utf-8")
        try:
            yield tuple(descriptors)
        finally:
            if keep:
                path.write_text("", encoding="utf-8")
            else:  # filelock takes no lock on a deleted file, so nobody holds a lock that others do not see
                path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def launch_name() -> str:
    """Return the name of the launch that started this process: torchrun's run id, empty if it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def slurm_job() -> str:
    """Return SLURM's job of this process, as squeue shows it; empty outside one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def held_above(path: Path) -> bool:
    """Return whether this process or one that it descends from holds a lock, as when a sweep starts a training."""
    who = named(path)
    if who is None or who.host != socket.gethostname():
        return False
    return who.pid in {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}


def mode_like(folder: Path) -> int:
    """Return the mode of a file that everyone who may write to `folder` may read and write."""
    return 0o600 | folder.stat().st_mode & 0o066


def missing_flock(path: Path) -> str | None:
    """Return why the file system of `path` has no flock; None if it has."""
    try:
        with FileLock(path, timeout=_INSTANT, fallback_to_soft=False):
            return None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return error.strerror


def holder(path: Path) -> tuple[Holder | None, bool]:
    """Who holds a lock, or was killed while it did, and whether it is held now."""
    who = named(path)
    if not path.is_file():
        return None, False
    for look in range(_LOOKS):
        if not _held(path):
            return named(path), False
        who = named(path)
        if who is not None and look:
            break
        time.sleep(_POLL_SECONDS)
    return who or Holder("an unknown host", 0, time.time()), True


def _held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return named(path) is not None  # who may not write here can only read the name
        if error.errno not in _NO_FLOCK:
            raise
    if not _marker(path).exists():
        return False
    try:
        # Taking it takes a marker away whose process on this host is dead.
        with SoftFileLock(_marker(path), timeout=0):
            return False
    except Timeout:
        return True


def named(path: Path) -> Holder | None:
    """Who a lock file names; None where it names nobody, because the last holder has ended well."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.held")


@functools.cache
def _warn_once(cause: str | None) -> None:
    logger.warning(
        "The file system has no flock (%s); a file ending in .held, which names host and process, stands for a lock. "
        "After a crash, another host cannot tell that it may go: delete it then, or mount the file system with flock.",
        cause,
    )
