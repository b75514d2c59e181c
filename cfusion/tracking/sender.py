"""A process that sends journals to MLflow while the program trains.

Importing MLflow takes seconds of Python's interpreter lock, which a thread would take from the training. The process
reads requests from its standard input, one JSON object a line, and answers on its standard output. It ends at the end
of its input, after a last attempt for every journal, so that it outlives neither a finished program nor a killed one.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfusion.errors import CfusionError, ConfigError
from cfusion.secret_text import SecretsLeftOut
from cfusion.tracking.address import client_class
from cfusion.tracking.delivery import send
from cfusion.tracking.journal import JOURNAL_NAME

logger = logging.getLogger(__name__)

MOST_OF_THE_TIME = 0.01
"""Maximum share of the time spent on sending, over all journals; above it, records are sent less often."""


@dataclass(frozen=True)
class Pace:
    """How often journals are sent.

    Attributes:
        seconds: Interval at which a journal is sent.
        longest: Maximum interval between two attempts, if the server is down or sending is expensive.
        last_attempts: Maximum number of attempts at the end of a run.
        last_pause: Seconds between two of them.
        last_seconds: Seconds after which no new attempt starts, so that a hanging server delays the end only once.
    """

    seconds: float = 5.0
    longest: float = 60.0
    last_attempts: int = 3
    last_pause: float = 1.0
    last_seconds: float = 10.0


class Follower:
    """Sends one journal whenever it is due.

    Attributes:
        due: Time of the next attempt, in seconds of `time.monotonic`.
        refused: The server cannot do what the run asks for; everything else was sent.
    """

    def __init__(self, folder: Path, uri: str, pace: Pace) -> None:
        self.folder, self.uri, self.pace = folder, uri, pace
        self.due = time.monotonic()
        self.refused: ConfigError | None = None
        self._pause = pace.seconds
        self._lost = False

    def attempt(self, followers: int = 1) -> None:
        """Send what is new, and set the time of the next attempt for a process that follows `followers` journals."""
        started = time.process_time()
        sent = self._send()
        needed = (time.process_time() - started) * followers / MOST_OF_THE_TIME
        self._pause = min(max(self.pace.seconds, needed) if sent else 2 * self._pause, self.pace.longest)
        self.due = time.monotonic() + self._pause

    def finish(self) -> None:
        """Send the rest, with a few retries."""
        started = time.monotonic()
        for _ in range(self.pace.last_attempts - 1):
            if self._send() or time.monotonic() - started > self.pace.last_seconds:
                return
            time.sleep(self.pace.last_pause)
        self._send()

    def _send(self) -> bool:
        """Send the journal; return whether the server accepted it."""
        try:
            _sync(self.folder / JOURNAL_NAME)
            send(self.folder, self.uri)
        except ConfigError as error:
            self.refused = error
        except CfusionError as error:
            if not self._lost:
                logger.warning("tracking: %s The run continues; its records are kept and sent later.", error)
            self._lost = True
            return False
        except Exception:  # a defect of tracking must not end a training; it is logged with its traceback
            logger.exception("tracking failed; the records of the run are kept in %s", self.folder / JOURNAL_NAME)
            self._lost = True
            return False
        if self._lost:
            logger.info("tracking: the server answers again")
        self._lost = False
        return True


def follow(requests: queue.Queue[dict[str, Any] | None], answer: Callable[[dict[str, Any]], None]) -> None:
    """Do the requests until None arrives, and send journals in between.

    Args:
        requests: `{"do": "follow", "folder": …, "uri": …, "pace": …}` starts sending the journal of a run; with
            `"do": "finish"` its rest is sent, and the request is answered.
        answer: Takes `{"finished": FOLDER, "refused": [MESSAGE, REMEDY, TOPIC] or None}`.
    """
    followers: dict[str, Follower] = {}
    while True:
        try:
            next_due = min((follower.due for follower in followers.values()), default=None)
            wait = None if next_due is None else max(0.0, next_due - time.monotonic())
            request = requests.get(timeout=wait)
        except queue.Empty:
            min(followers.values(), key=lambda follower: follower.due).attempt(len(followers))
            continue
        if request is None:
            break
        folder = request["folder"]
        follower = followers.pop(folder, None) or Follower(Path(folder), request["uri"], Pace(**request["pace"]))
        if request["do"] == "follow":
            followers[folder] = follower
            continue
        follower.finish()
        error = follower.refused
        answer({"finished": folder, "refused": error and [error.message, error.remedy, error.topic]})
    for follower in followers.values():
        follower.attempt()


class _ToParent(logging.Handler):
    """Hands log records to the process that trains, so that they appear where its own do."""

    def __init__(self, answer: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.setFormatter(SecretsLeftOut())
        self._answer = answer

    def emit(self, record: logging.LogRecord) -> None:
        self._answer({"log": record.name, "level": record.levelno, "text": self.format(record)})


def main() -> None:
    """Serve the process that started this one."""
    # The process that trains decides how it ends; a signal to its process group must not lose the last records.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # MLflow prints on standard output
    lock = threading.Lock()

    def answer(line: dict[str, Any]) -> None:
        with lock:
            try:
                answers.write(json.dumps(line) + "\n")
                answers.flush()
            except BrokenPipeError:  # the process that trained is gone
                pass

    logging.getLogger("cfusion").addHandler(_ToParent(answer))
    logging.getLogger("cfusion").setLevel(logging.INFO)
    logging.getLogger("cfusion").propagate = False
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    client_class()  # at once, while the program that trains imports what it needs itself
    follow(requests, answer)


def _sync(path: Path) -> None:
    """Flush a file to disk: what a server has accepted must not be missing after a loss of power."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return  # `send` names what is missing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
