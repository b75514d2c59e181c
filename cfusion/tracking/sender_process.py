"""The process that sends this program's journals: started with the first run, ended with the program."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path
from typing import IO

from cfusion.child_processes import child_environment, python_command
from cfusion.console import waiting_for
from cfusion.errors import ConfigError
from cfusion.tracking.sender import Pace

logger = logging.getLogger(__name__)


class SenderProcess:
    """A `cfusion.tracking.sender` in a separate process.

    If it is lost, a run's records stay in its journal, and the run says how to send them.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*python_command(), "-c", "from cfusion.tracking.sender import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            env=child_environment(ends_with_this=False),
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input: IO[str] = self._process.stdin
        self._output: IO[str] = self._process.stdout
        self._finished: dict[str, list[str] | None] = {}
        self._answered = threading.Condition()
        self._ended = False
        self._asked = False
        self._thread = threading.Thread(target=self._read, name="tracking", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._ended and self._process.poll() is None

    def follow(self, folder: Path, uri: str, pace: Pace) -> None:
        """Send the journal of a run's folder from now on, while it is being written."""
        self._request("follow", folder, uri, pace)

    def finish(self, folder: Path, uri: str, pace: Pace) -> ConfigError | None:
        """Send the rest of a journal and wait for it.

        Returns:
            What the server cannot do, such as register a model under a name that another model has; None if it can.
        """
        name = self._request("finish", folder, uri, pace)
        with waiting_for("the tracking server to take the last records"), self._answered:
            self._answered.wait_for(lambda: self._ended or name in self._finished)
            refused = self._finished.pop(name, None)
        if refused is None:
            return None
        message, remedy, topic = refused
        return ConfigError(message, remedy, topic=topic)

    @property
    def pid(self) -> int:
        """Its number in the system."""
        return self._process.pid

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait()
        self._thread.join()

    def end(self) -> None:
        """End it once it has sent what it was asked to send; at once if it was asked for nothing."""
        if not self._asked:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self.wait()
        self._output.close()

    def _request(self, what: str, folder: Path, uri: str, pace: Pace) -> str:
        """Send a request, and return the folder's name in the answer."""
        name = str(folder.absolute())
        self._asked = True
        request = {"do": what, "folder": name, "uri": uri, "pace": asdict(pace)}
        try:
            self._input.write(json.dumps(request) + "\n")
            self._input.flush()
        except (BrokenPipeError, ValueError):
            logger.warning("tracking: the process that sends records has ended")
        return name

    def _read(self) -> None:
        for line in self._output:
            answer = json.loads(line)
            if "log" in answer:
                logging.getLogger(answer["log"]).log(answer["level"], "%s", answer["text"])
                continue
            with self._answered:
                self._finished[answer["finished"]] = answer["refused"]
                self._answered.notify_all()
        with self._answered:
            self._ended = True
            self._answered.notify_all()


_the_process: SenderProcess | None = None


def sender_process() -> SenderProcess:
    """Return the process of this program; start it if there is none."""
    global _the_process
    if _the_process is None or not _the_process.alive:
        _the_process = SenderProcess()
    return _the_process


@atexit.register
def end_sender() -> None:
    """End the process of this program, if there is one."""
    global _the_process
    if _the_process is not None:
        _the_process.end()
        _the_process = None
