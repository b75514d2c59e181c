"""Record what a run sends to MLflow as JSON lines in the run's folder, so that no kill or server failure loses it."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfusion.errors import DataError

JOURNAL_NAME = "tracking.jsonl"

PARENT = ""
"""Key of the parent run; a child's key is its name."""

Record = dict[str, Any]


@dataclass
class RecordedRun:
    """What the journal contains about one MLflow run.

    Attributes:
        status: RUNNING, FINISHED, FAILED or KILLED.
        steps: Last step of each metric.
        things: Recorded artifacts, inputs and registrations, so that none is recorded twice.
    """

    status: str = "RUNNING"
    steps: dict[str, int] = field(default_factory=dict)
    things: set[str] = field(default_factory=set)

    def add(self, record: Record) -> None:
        """Update the state with a record."""
        if record["kind"] == "metrics":
            self.steps.update(dict.fromkeys(record["values"], record["step"]))
        elif record["kind"] == "status":
            self.status = record["status"]
        elif record["kind"] != "start":
            self.things.add(_name(record))


class Journal:
    """The records of a run, in order; several threads may append.

    Opened again on the same file, it continues after the last complete record. Steps, files and ends that are already
    recorded are skipped, so a run that resumes at its last checkpoint repeats nothing.

    Args:
        path: The file; created if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, RecordedRun] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        complete = 0
        for record, end in read_records(path):
            complete = end
            self.runs.setdefault(record["run"], RecordedRun()).add(record)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(complete)
        self._dirty = False
        self._lock = threading.Lock()

    def start(self, key: str, **values: Any) -> None:
        """Start the run `key`, or resume it if it has not finished."""
        known = self.runs.get(key)
        if known is None:
            self._append(key, "start", id=uuid.uuid4().hex, **values)
        elif known.status != "FINISHED":
            self._append(key, "status", status="RUNNING", cause="")

    def metrics(self, key: str, values: Mapping[str, float], step: int) -> None:
        """Record metrics, except those that already have this step."""
        last = self.runs[key].steps
        new = {name: _number(value) for name, value in values.items() if step > last.get(name, -1)}
        if new:
            self._append(key, "metrics", step=step, values=new)

    def status(self, key: str, status: str, cause: str = "") -> None:
        """Record how a run ended, and the cause of a failure."""
        if self.runs[key].status != status:
            self._append(key, "status", status=status, cause=cause)

    def once(self, key: str, kind: str, **values: Any) -> None:
        """Record an artifact, inputs or a registration, unless it is already recorded."""
        if _name({"kind": kind, **values}) not in self.runs[key].things:
            self._append(key, kind, **values)

    def sync(self) -> None:
        """Flush appended records to disk."""
        if self._dirty and not self._file.closed:
            self._dirty = False
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush everything to disk and close the file."""
        self.sync()
        self._file.close()

    def _append(self, key: str, kind: str, **values: Any) -> None:
        record = {"run": key, "kind": kind, "time": int(time.time() * 1000), **values}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._write(line)
            self._dirty = True
            self.runs.setdefault(key, RecordedRun()).add(record)

    def _write(self, line: bytes) -> None:
        """Append a complete line, or leave the file unchanged.

        Raises:
            DataError: The line cannot be written, for example on a full disk.
        """
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) == len(line):
                return
            cause = "no space left"
        except OSError as error:
            cause = error.strerror or str(error)
        self._file.truncate(end)
        raise DataError(
            f"{self.path}: cannot be written ({cause}).", "Free some space and restart the run; it resumes."
        )


def read_records(path: Path, position: int = 0) -> Iterator[tuple[Record, int]]:
    """Yield the complete records from a byte position on, each with its end position; skip an incomplete last line.

    Raises:
        DataError: A line is not a record.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        stream.seek(position)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            try:
                record = json.loads(line)
                record["run"], record["kind"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}: the record that ends at byte {position} is not readable.",
                    "Delete the file; the results of the run do not depend on it.",
                ) from error
            yield record, position


def _name(record: Record) -> str:
    values = {k: v for k, v in record.items() if k not in ("run", "time")}
    return json.dumps(values, sort_keys=True)


def _number(value: float) -> float | str:
    """Return a metric as a JSON value; values that are not finite become text that `float` can parse."""
    return float(value) if math.isfinite(value) else str(float(value))
