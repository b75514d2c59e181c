"""Files of a sweep in a run's folder: how its attempts went and what they cost, why it failed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cfusion.files import read_json, write_json
from cfusion.secret_text import without_secrets

JOBS = "jobs"
"""Folder of the tasks' scripts and logs in the folder of a sweep."""

ATTEMPTS_FILE, FAILED, LOG = "attempts.json", "failed.json", "run.log"


def attempts(folder: Path) -> list[dict[str, Any]]:
    """Return the attempts at a run, oldest first: `outcome`, and its cost (see `launch.sweep.cost`) unless killed."""
    path = folder / ATTEMPTS_FILE
    return read_json(path) if path.is_file() else []


def add_attempt(folder: Path, attempt: dict[str, Any]) -> None:
    """Append an attempt."""
    write_json(folder / ATTEMPTS_FILE, [*attempts(folder), attempt])


def write_failure(folder: Path, cause: str) -> None:
    """Mark a run as failed with its cause; its log has the details."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / FAILED,
        {
            "cause": " ".join(without_secrets(cause).split()),
            "log": LOG,
            "attempts": len(attempts(folder)),
            "at": time.time(),
        },
    )


def read_failure(folder: Path) -> dict[str, Any] | None:
    """Return the failure of a run: `cause`, `log`, `attempts`, `at`; None if it has not failed."""
    path = folder / FAILED
    return read_json(path) if path.is_file() else None


def clear_failure(folder: Path) -> None:
    """Remove the mark, so that the run is tried again."""
    (folder / FAILED).unlink(missing_ok=True)
