"""Track a run without ever waiting for a server: calls only write to a journal in the run's folder.

Another process (`cfusion.tracking.sender`) sends the journal. If the server is down or hangs, the training continues,
and the records are sent when the server answers again, at the end of the run, or by `cfusion track send`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cfusion.config import TrackingConfig
from cfusion.errors import RequeueError
from cfusion.secret_text import without_secrets
from cfusion.tracking.address import tracking_uri
from cfusion.tracking.delivery import delivery_of, unsent
from cfusion.tracking.journal import JOURNAL_NAME, PARENT, Journal
from cfusion.tracking.machine import Machine
from cfusion.tracking.sender import Pace
from cfusion.tracking.sender_process import sender_process

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 10.0
"""Interval at which the load of the machine is sampled."""

PACE = Pace()
"""How often journals are sent."""


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
        courier.start()
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
            self.close("KILLED" if stopped else "FAILED", without_secrets(f"{type(error).__name__}: {error}")[:500])

    def _start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if self._courier is not None:
            texts = {key: str(value)[:6000] for key, value in params.items()}
            self._courier.journal.start(
                self._key, experiment=self._experiment, name=name, params=texts, tags=dict(tags)
            )


class Courier:
    """Has a journal sent by another process while it is being written, and samples the machine."""

    def __init__(self, journal: Journal, folder: Path, uri: str) -> None:
        self.journal, self.folder, self.uri = journal, folder, uri
        self._machine = Machine()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="machine", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        sender_process().follow(self.folder, self.uri, PACE)
        self._thread.start()

    def close(self, status: str, cause: str) -> None:
        """End all open runs, send the remaining records, and report those that could not be sent."""
        self._closing.set()
        self._thread.join()
        self._sample()
        for key, run in list(self.journal.runs.items()):
            if key != PARENT and run.status == "RUNNING":
                self.journal.status(key, status, cause)
        self.journal.status(PARENT, status, cause)
        self.journal.close()
        refused = sender_process().finish(self.folder, self.uri, PACE)
        if left := unsent(self.folder, self.uri):
            of_environment = os.environ.get("MLFLOW_TRACKING_URI") == self.uri
            logger.warning(
                "%d records of this run are unsent and kept in %s; when the server is back, run: "
                "cfusion track send %s%s", left, self.journal.path, self.folder,
                " (with the same MLFLOW_TRACKING_URI)" if of_environment else "",
            )  # fmt: skip
        if refused is not None and status == "FINISHED":
            raise refused

    def _watch(self) -> None:
        while not self._closing.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        step = self.journal.runs[PARENT].steps.get("system/cpu_utilization_percentage", -1) + 1
        self.journal.metrics(PARENT, self._machine.sample(), step)
