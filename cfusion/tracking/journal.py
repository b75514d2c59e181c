"""What a run tells MLflow, written to the run's own folder first: JSON lines that outlive a kill and a lost server."""

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
class Told:
    """What the journal holds of one MLflow run.

    Attributes:
        status: RUNNING, FINISHED, FAILED or KILLED.
        steps: Per metric, its last step.
        things: Artifacts, inputs and registrations, so that none is told twice.
    """

    status: str = "RUNNING"
    steps: dict[str, int] = field(default_factory=dict)
    things: set[str] = field(default_factory=set)

    def add(self, record: Record) -> None:
        """Take a record into account."""
        if record["kind"] == "metrics":
            self.steps.update(dict.fromkeys(record["values"], record["step"]))
        elif record["kind"] == "status":
            self.status = record["status"]
        elif record["kind"] != "start":
            self.things.add(_name(record))


class Journal:
    """The records of a run, in the order they were made; several threads may append.

    Started again on the same folder it goes on behind the last whole record: steps, files and ends that were told
    before are not told again, so a run that resumes at its last checkpoint repeats nothing.

    Args:
        path: The file; it is made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Told] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        for record, end in read_records(path):
            whole = end
            self.runs.setdefault(record["run"], Told()).add(record)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole)
        self._dirty = False
        self._lock = threading.Lock()

    def start(self, key: str, **values: Any) -> None:
        """Begin the run `key`, or go on with it where it had not finished."""
        told = self.runs.get(key)
        if told is None:
            self._append(key, "start", id=uuid.uuid4().hex, **values)
        elif told.status != "FINISHED":
            self._append(key, "status", status="RUNNING", cause="")

    def metrics(self, key: str, values: Mapping[str, float], step: int) -> None:
        """Note metrics, but for those that have this step already."""
        last = self.runs[key].steps
        new = {name: _number(value) for name, value in values.items() if step > last.get(name, -1)}
        if new:
            self._append(key, "metrics", step=step, values=new)

    def status(self, key: str, status: str, cause: str = "") -> None:
        """Note how a run ended, and why where it failed."""
        if self.runs[key].status != status:
            self._append(key, "status", status=status, cause=cause)

    def once(self, key: str, kind: str, **values: Any) -> None:
        """Note an artifact, inputs or a registration, unless it was noted before."""
        if _name({"kind": kind, **values}) not in self.runs[key].things:
            self._append(key, kind, **values)

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        if self._dirty and not self._file.closed:
            self._dirty = False
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Bring everything to the disk and let go of the file."""
        self.sync()
        self._file.close()

    def _append(self, key: str, kind: str, **values: Any) -> None:
        record = {"run": key, "kind": kind, "time": int(time.time() * 1000), **values}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._write(line)
            self._dirty = True
            self.runs.setdefault(key, Told()).add(record)

    def _write(self, line: bytes) -> None:
        """Write a line whole or not at all.

        Raises:
            DataError: The disk takes no more.
        """
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) == len(line):
                return
            cause = "no space left"
        except OSError as error:
            cause = error.strerror or str(error)
        self._file.truncate(end)
        raise DataError(f"{self.path}: cannot be written ({cause}).", "Make room and start the run again: it goes on.")


def read_records(path: Path, position: int = 0) -> Iterator[tuple[Record, int]]:
    """The whole records from a byte position on, each with the position behind it; a torn last line is left out.

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
                    "Delete the file; the run's own results do not depend on it.",
                ) from error
            yield record, position


def _name(record: Record) -> str:
    told = {k: v for k, v in record.items() if k not in ("run", "time")}
    return json.dumps(told, sort_keys=True)


def _number(value: float) -> float | str:
    """A metric as JSON has it: what is not finite is text, which `float` reads again."""
    return float(value) if math.isfinite(value) else str(float(value))
