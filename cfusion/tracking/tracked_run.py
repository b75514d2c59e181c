"""Track a run without ever waiting for a server: calls only write to a journal in the run's folder.

A background thread sends the journal and samples the machine. If the server is down or hangs, the training continues,
and the records are sent when the server answers again, at the end of the run, or by `cfusion track send`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cfusion.config import TrackingConfig
from cfusion.errors import CfusionError, ConfigError, RequeueError
from cfusion.tracking.address import tracking_uri
from cfusion.tracking.delivery import delivery_of, send, unsent
from cfusion.tracking.journal import JOURNAL_NAME, PARENT, Journal
from cfusion.tracking.machine import Machine

logger = logging.getLogger(__name__)

SEND_SECONDS = 5.0
"""Interval at which the journal is sent."""

LONGEST_PAUSE_SECONDS = 60.0
"""Maximum interval between two attempts, if the server is down or sending is expensive."""

LAST_ATTEMPTS, LAST_PAUSE_SECONDS, LAST_SECONDS = 3, 1.0, 10.0
"""At the end of a run: maximum number of attempts to send the rest, the pause between two attempts, and the time after
which no new attempt starts, so that a hanging server delays the end only once."""

MOST_OF_THE_TIME = 0.01
"""Maximum share of a process's time spent on sending, over all its runs; above it, records are sent less often."""


class TrackedRun:
    """One MLflow run; `begin` returns the parent run, `child` a child of it.

    If tracking is disabled, all calls do nothing. As a context manager it ends the run as FINISHED, as KILLED after a
    request to stop, or as FAILED with the error as the cause. A run whose process was killed is resumed by the next
    `begin` on the same folder.
    """

    def __init__(self, key: str, experiment: str, courier: Courier | None) -> None:
        self._key = key
        self._experiment = experiment
        self._courier = courier

    @classmethod
    def begin(
        cls,
        tracking: TrackingConfig,
        output: Path,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Start the run of an output folder, or resume it if it did not finish.

        Args:
            tracking: Whether to track, and the address.
            output: Folder of the run. It contains the journal; the default database is next to it.
            name: Name of the run.
            params: Flat parameters.
            tags: Tags for searching runs.

        Raises:
            ConfigError: MLflow has no tracking store for this kind of address.
        """
        if not tracking.enabled:
            return cls(PARENT, "", None)
        uri = tracking_uri(tracking, output)
        courier = Courier(Journal(output / JOURNAL_NAME), output, uri)
        run = cls(PARENT, tracking.experiment, courier)
        run._start(name, params, tags or {})
        courier.thread.start()
        return run

    def child(self, name: str, params: Mapping[str, Any]) -> TrackedRun:
        """Start a child run, or resume the one of that name if it did not finish."""
        run = TrackedRun(name, self._experiment, self._courier)
        run._start(name, params, {})
        return run

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record metrics of a step; a step that is already recorded, as after a resume, is skipped."""
        if self._courier is not None:
            self._courier.journal.metrics(self._key, metrics, step)

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Record input data: each with `name, digest, kind, source, profile` (JSON) and `context` (its purpose)."""
        if self._courier is not None:
            self._courier.journal.once(self._key, "inputs", datasets=[dict(data) for data in datasets])

    def artifacts(self, path: Path, under: str | None = None) -> None:
        """Record a file or folder of the run's output folder as an artifact; it is read only when it is sent."""
        if self._courier is not None:
            relative = os.path.relpath(path, self._courier.folder)
            self._courier.journal.once(self._key, "artifacts", path=relative, under=under)

    def register(self, name: str, about: Mapping[str, str]) -> None:
        """Register the fold models of the output folder as a version of the model `name` (see `register_ensemble`)."""
        if self._courier is not None:
            self._courier.journal.once(self._key, "register", name=name, about=dict(about))

    def registered(self, name: str) -> str | None:
        """Return the version registered under `name`; None if the server has not answered yet."""
        return (
            None if self._courier is None else delivery_of(self._courier.folder, self._courier.uri).versions.get(name)
        )

    def close(self, status: str = "FINISHED", cause: str = "") -> None:
        """End the run as FINISHED, FAILED or KILLED; the parent also sends the remaining records.

        Raises:
            ConfigError: The model cannot be registered under its name; everything else was sent.
        """
        if self._courier is None:
            return
        if self._key == PARENT:
            self._courier.close(status, cause)
        else:
            self._courier.journal.status(self._key, status, cause)

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            stopped = isinstance(error, RequeueError | KeyboardInterrupt | SystemExit)
            self.close("KILLED" if stopped else "FAILED", f"{type(error).__name__}: {error}"[:500])

    def _start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if self._courier is not None:
            texts = {key: str(value)[:6000] for key, value in params.items()}
            self._courier.journal.start(
                self._key, experiment=self._experiment, name=name, params=texts, tags=dict(tags)
            )


class Courier:
    """Sends a journal from a background thread while it is being written."""

    _at_work: set[Courier] = set()  # noqa: RUF012 - shared by all couriers of the process

    def __init__(self, journal: Journal, folder: Path, uri: str) -> None:
        self.journal, self.folder, self.uri = journal, folder, uri
        self.thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._machine = Machine()
        self._closing = threading.Event()
        self._lost = False
        self._refused: ConfigError | None = None
        Courier._at_work.add(self)

    def close(self, status: str, cause: str) -> None:
        """End all open runs, send the remaining records, and report those that could not be sent."""
        Courier._at_work.discard(self)
        self._sample()
        for key, run in list(self.journal.runs.items()):
            if key != PARENT and run.status == "RUNNING":
                self.journal.status(key, status, cause)
        self.journal.status(PARENT, status, cause)
        self.journal.sync()
        self._closing.set()
        self.thread.join()
        self.journal.close()
        if left := unsent(self.folder, self.uri):
            logger.warning(
                "%d records of this run are unsent and kept in %s; when the server is back, run: cfusion track send %s",
                left, self.journal.path, self.folder,
            )  # fmt: skip
        if self._refused is not None and status == "FINISHED":
            raise self._refused

    def _work(self) -> None:
        pause = SEND_SECONDS
        while not self._closing.wait(pause):
            self._sample()
            started = time.thread_time()
            sent = self._send()
            due = (time.thread_time() - started) * len(Courier._at_work) / MOST_OF_THE_TIME
            pause = min(max(SEND_SECONDS, due) if sent else 2 * pause, LONGEST_PAUSE_SECONDS)
        self._send_last()

    def _send_last(self) -> None:
        """Send the remaining records, with a few retries."""
        started = time.monotonic()
        for _ in range(LAST_ATTEMPTS - 1):
            if self._send() or time.monotonic() - started > LAST_SECONDS:
                return
            time.sleep(LAST_PAUSE_SECONDS)
        self._send()

    def _sample(self) -> None:
        step = self.journal.runs[PARENT].steps.get("system/cpu_utilization_percentage", -1) + 1
        self.journal.metrics(PARENT, self._machine.sample(), step)

    def _send(self) -> bool:
        """Send the journal; return whether the server accepted it."""
        try:
            self.journal.sync()
            send(self.folder, self.uri)
        except ConfigError as error:
            self._refused = error
        except CfusionError as error:
            if not self._lost:
                logger.warning("tracking: %s The run continues; its records are kept and sent later.", error)
            self._lost = True
            return False
        except Exception:  # a defect of tracking must not end a training; it is logged with its traceback
            logger.exception("tracking failed; the records of the run are kept in %s", self.journal.path)
            self._lost = True
            return False
        if self._lost:
            logger.info("tracking: the server answers again")
        self._lost = False
        return True
