"""A tracked run: what a training calls; it writes to the run's folder and never waits for a server.

A thread beside the training sends what was written and looks at the machine now and then. A server that is away or
hangs costs the training nothing; what it has not got is sent when it answers again, at the end, or by
`cfusion track send`.
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
"""How often what was written is sent."""

LONGEST_PAUSE_SECONDS = 60.0
"""At most so long passes between two attempts, at a server that is away or where sending is dear."""

LAST_ATTEMPTS, LAST_PAUSE_SECONDS, LAST_SECONDS = 3, 1.0, 10.0
"""At the end of a run: most attempts at what is left, the pause between two, and since when none is begun any more,
so that a server that hangs holds up the end once."""

MOST_OF_THE_TIME = 0.01
"""Share of a process's time that sending may take, over all its runs; where it takes more it is done less often."""


class TrackedRun:
    """One MLflow run; `begin` gives the parent, `child` a run below it.

    Where tracking is off the calls are the same and do nothing. As a context it ends as FINISHED, as KILLED where it
    was asked to stop, or else as FAILED with the error as its cause; one that never came to an end, because its
    process was killed, is gone on with by the next `begin` on the same folder.
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
        """Start the run of an output folder, or go on with it where it did not finish.

        Args:
            tracking: Whether, and where to.
            output: Folder of the run; its journal and the default database lie there and beside it.
            name: Name of the run.
            params: Flat parameters.
            tags: What runs are searched by.

        Raises:
            ConfigError: The address cannot be one of MLflow's.
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
        """A run below this one; one of that name that did not finish is gone on with."""
        run = TrackedRun(name, self._experiment, self._courier)
        run._start(name, params, {})
        return run

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Note metrics of a step; a step that is noted already, as after a resume, is left as it is."""
        if self._courier is not None:
            self._courier.journal.metrics(self._key, metrics, step)

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Note the data: each with `name, digest, kind, source, profile` (JSON) and `context` (what it is for)."""
        if self._courier is not None:
            self._courier.journal.once(self._key, "inputs", datasets=[dict(data) for data in datasets])

    def artifacts(self, path: Path, under: str | None = None) -> None:
        """Keep a file, or the files of a folder, of the run's output folder; they are read when they are sent."""
        if self._courier is not None:
            told = os.path.relpath(path, self._courier.folder)
            self._courier.journal.once(self._key, "artifacts", path=told, under=under)

    def register(self, name: str, about: Mapping[str, str]) -> None:
        """Register the fold models of the output folder as a version of the model `name` (see `register_ensemble`)."""
        if self._courier is not None:
            self._courier.journal.once(self._key, "register", name=name, about=dict(about))

    def registered(self, name: str) -> str | None:
        """The version that was registered under `name`; None where the server has not answered yet."""
        return (
            None if self._courier is None else delivery_of(self._courier.folder, self._courier.uri).versions.get(name)
        )

    def close(self, status: str = "FINISHED", cause: str = "") -> None:
        """End the run as FINISHED, FAILED or KILLED; for the parent also send what is left, if the server answers.

        Raises:
            ConfigError: The model cannot be registered under its name; all else is sent.
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
            told = {key: str(value)[:6000] for key, value in params.items()}
            self._courier.journal.start(self._key, experiment=self._experiment, name=name, params=told, tags=dict(tags))


class Courier:
    """Sends a journal while it is being written, from a thread of its own."""

    _at_work: set[Courier] = set()  # noqa: RUF012 - all couriers of the process share it

    def __init__(self, journal: Journal, folder: Path, uri: str) -> None:
        self.journal, self.folder, self.uri = journal, folder, uri
        self.thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._machine = Machine()
        self._closing = threading.Event()
        self._lost = False
        self._refused: ConfigError | None = None
        Courier._at_work.add(self)

    def close(self, status: str, cause: str) -> None:
        """End all runs that are still open, send what is left, and say what could not be sent."""
        Courier._at_work.discard(self)
        self._sample()
        for key, told in list(self.journal.runs.items()):
            if key != PARENT and told.status == "RUNNING":
                self.journal.status(key, status, cause)
        self.journal.status(PARENT, status, cause)
        self.journal.sync()
        self._closing.set()
        self.thread.join()
        self.journal.close()
        if left := unsent(self.folder, self.uri):
            logger.warning(
                "%d records of this run are kept in %s; once the server is back: cfusion track send %s",
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
        """Send what is left; a server that does not take it is asked again after a moment."""
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
        """Send what there is; returns whether the server took it."""
        try:
            self.journal.sync()
            send(self.folder, self.uri)
        except ConfigError as error:
            self._refused = error
        except CfusionError as error:
            if not self._lost:
                logger.warning("tracking: %s The run goes on; what it tells is kept and sent later.", error)
            self._lost = True
            return False
        except Exception:  # a defect of tracking must not end a training; it is told in full
            logger.exception("tracking failed; what the run tells is kept in %s", self.journal.path)
            self._lost = True
            return False
        if self._lost:
            logger.info("tracking: the server answers again")
        self._lost = False
        return True
