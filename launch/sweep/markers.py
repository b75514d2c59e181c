"""What a sweep writes beside a run: who trains it, how its attempts went and what they cost, and why it failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfusion.files import read_json, write_json
from cfusion.locks import HeldError, Holder, hold, holder

LOCK, ATTEMPTS_FILE, FAILED, LOG = "run.lock", "attempts.json", "failed.json", "run.log"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[tuple[int, ...]]:
    """Hold a run while the block lasts; yields descriptors, and a child that is given them holds the run too.

    Raises:
        HeldError: Another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptors = stack.enter_context(hold(folder / LOCK))
        except HeldError as error:
            raise HeldError(f"{folder.name}: {error.message} trains it.", "Leave it, or end that.") from None
        yield descriptors


def trainer(folder: Path) -> tuple[Holder | None, bool]:
    """Who trains a run, or was killed in it, and whether that process still holds it."""
    return holder(folder / LOCK)


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
    write_json(
        folder / FAILED,
        {"cause": " ".join(cause.split()), "log": LOG, "attempts": len(attempts(folder)), "at": time.time()},
    )


def read_failure(folder: Path) -> dict[str, Any] | None:
    """The failure of a run: `cause`, `log`, `attempts`, `at`; None where it has not failed."""
    path = folder / FAILED
    return read_json(path) if path.is_file() else None


def clear_failure(folder: Path) -> None:
    """Take the mark away: the run is tried again."""
    (folder / FAILED).unlink(missing_ok=True)
