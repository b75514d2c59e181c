"""Fan-out: one extraction as a SLURM job array, on a Ray cluster, or as a process for each GPU of this machine.

Every task takes one of equal shares of the sorted slides. Finished slides are skipped, so a task that was killed is
started again and does the rest; no lock is held that a crash could leave behind.
"""

from __future__ import annotations

import logging
import multiprocessing
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from cfusion.console import progress
from cfusion.errors import CfusionError, ConfigError, DataError, RequeueError
from cfusion.files import digest_json
from cfusion.interruption import graceful_stop, stop_requested
from launch.tasks.attempts import attempt_all
from launch.tasks.ray_tasks import run_ray
from launch.tasks.slurm_array import array_script, run_slurm
from launch.tasks.task import TaskResources, cause_of
from preprocess.extraction import check_inputs, preprocess_slides
from preprocess.outcome import SlideOutcome, Summary, write_summary
from preprocess.settings import PreprocessConfig

logger = logging.getLogger(__name__)

_SLURM_NAME = "cfusion-preprocess"


@dataclass(frozen=True)
class FanOut:
    """How the slides are distributed.

    Attributes:
        executor: `slurm`: a job array; `ray`: tasks of a Ray cluster.
        tasks: Equal shares of the slides, one task each.
        retries: Further attempts at a share that was lost or failed unexpectedly; invalid input is not tried again.
        resources: Resources of a task.
        address: Address of the Ray cluster.
    """

    executor: Literal["slurm", "ray"]
    tasks: int = 1
    retries: int = 2
    resources: TaskResources = field(default_factory=TaskResources)
    address: str = "auto"


@dataclass(frozen=True)
class ShareResult:
    """How a share went.

    Attributes:
        name: The share.
        summary: Outcome of its slides; None if it did not end.
        error: An error that every attempt would meet, such as invalid input.
        cause: Why it was lost, in one line.
        stopped: Whether a signal stopped it.
    """

    name: str
    summary: Summary | None = None
    error: CfusionError | None = None
    cause: str = ""
    stopped: bool = False

    @property
    def retry(self) -> bool:
        """Whether another attempt may succeed."""
        return bool(self.cause) and not self.stopped

    @property
    def word(self) -> str:
        """How it went, in one line."""
        if self.summary is None:
            return "stopped" if self.stopped else str(self.error or self.cause)
        counts = Counter(outcome.status for outcome in self.summary.outcomes)
        return ", ".join(f"{number} {status}" for status, number in counts.items()) or "no slides"


@dataclass(frozen=True)
class SlideShare:
    """One of equal shares of the slides; a task of `launch.tasks`.

    Attributes:
        config: Settings, with absolute paths.
        number: The share, from 0.
        of: Number of shares.
        overwrite: Extract stale slides again.
    """

    config: PreprocessConfig
    number: int
    of: int
    overwrite: bool = False

    @property
    def name(self) -> str:
        """Number of the share, for messages."""
        return f"share {self.number} of {self.of}"

    @property
    def names(self) -> tuple[str, ...]:
        """Its name with a digest of the settings: a share with other settings is other work."""
        digest = digest_json([self.config.model_dump(mode="json"), self.overwrite])
        return (f"{self.name}, settings {digest[:16]}",)

    def __call__(self) -> list[ShareResult]:
        """Extract the slides of the share; an error is returned as a value, so that no executor wraps it."""
        try:
            summary = preprocess_slides(
                self.config, share=(self.number, self.of), overwrite=self.overwrite, stop=stop_requested
            )
        except RequeueError:
            return [ShareResult(self.name, stopped=True)]
        except CfusionError as error:
            return [ShareResult(self.name, error=error)]
        except Exception as error:  # noqa: BLE001 - a task reports any cause; the caller tries again
            logger.error("%s", traceback.format_exc())
            return self.lost(cause_of(error))
        for outcome in summary.of("failed"):
            logger.info("%s: failed: %s", outcome.slide_id, outcome.why)
        return [ShareResult(self.name, summary)]

    def lost(self, cause: str, *, stopped: bool = False) -> list[ShareResult]:
        """Return that the share did not end."""
        return [ShareResult(self.name, cause=cause, stopped=stopped)]

    def refused(self, cause: str) -> list[ShareResult]:
        """Return that the share cannot start where it was sent."""
        return [ShareResult(self.name, error=DataError(f"{self.name}: {cause}."))]


def fan_out(config: PreprocessConfig, plan: FanOut, *, overwrite: bool = False) -> Summary:
    """Extract all slides of `config` on the executor of `plan`, and wait.

    Raises:
        CfusionError: See `preprocess_slides`.
        DataError: Every attempt at a share was lost.
        MissingExtraError: The executor's package is not installed.
        RequeueError: A signal asked for a stop; finished slides are kept.
    """
    if plan.tasks < 1 or plan.retries < 0:
        raise ConfigError(f"tasks={plan.tasks}, retries={plan.retries}: expected at least 1 and at least 0.")
    config = _with_absolute_paths(config)
    check_inputs(config)  # hours in a queue are too late to learn of a wrong folder
    shares = _shares(config, plan, overwrite)
    with graceful_stop(), progress("Shares", len(shares)) as bar:

        def attempt(todo: Sequence[SlideShare]) -> Iterator[ShareResult]:
            for result in _dispatch(todo, plan, config.store):
                if result.retry:
                    logger.warning("%s was lost: %s", result.name, result.cause)
                bar.advance(int(not result.retry))
                yield result

        results = attempt_all(shares, plan.retries, attempt)
    ended = [results[share.name] for share in shares if share.name in results]
    _raise_if_not_done(ended, plan.tasks, plan.retries + 1)
    return merge_summaries(config.store, [result.summary for result in ended if result.summary is not None])


def extract_by_device(config: PreprocessConfig, *, overwrite: bool = False) -> Summary:
    """Extract all slides of `config` with one process for each of its devices, or for each GPU, and wait.

    Each process has a separate interpreter, so that devices do not wait for each other's Python. A process that is lost
    is not started again; the same command does the rest.

    Raises:
        CfusionError: See `preprocess_slides`.
        ConfigError: No device is named and there is no GPU.
        DataError: A process was lost.
        RequeueError: A signal asked for a stop; finished slides are kept.
    """
    import torch

    devices = config.devices or tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    if not devices:
        raise ConfigError("--process-per-gpu: no GPU is visible.", "Leave it out, or name devices by --device.")
    check_inputs(config)
    each = {"threads": max(1, config.threads // len(devices))}
    shares = [
        SlideShare(config.model_copy(update={**each, "devices": (device,)}), number, len(devices), overwrite)
        for number, device in enumerate(devices)
    ]
    with graceful_stop():
        ended = [process.wait() for process in list(map(_DeviceProcess, shares))]
    _raise_if_not_done(ended, len(devices), 1)
    return merge_summaries(config.store, [result.summary for result in ended if result.summary is not None])


class _DeviceProcess:
    """A process that extracts a share."""

    def __init__(self, share: SlideShare) -> None:
        self._share, self._asked = share, False
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._results, sends = context.Pipe(duplex=False)
        self._process = context.Process(target=_run_share, args=(share, sends))
        self._process.start()
        sends.close()

    def wait(self) -> ShareResult:
        """Return how the share went; a request to stop is passed on to the process."""
        while not self._results.poll(0.2):
            if stop_requested() and not self._asked:
                self._asked = True
                self._process.terminate()
        try:
            result: ShareResult = self._results.recv()
        except EOFError:
            self._process.join()
            (result,) = self._share.lost(f"its process ended with {self._process.exitcode}", stopped=self._asked)
        self._process.join()
        return result


def _run_share(share: SlideShare, results: Connection) -> None:
    with graceful_stop():
        (result,) = share()
    results.send(result)


def rehearse(config: PreprocessConfig, plan: FanOut, *, overwrite: bool = False) -> Iterator[str]:
    """Yield, as lines, what `fan_out` would start, and check its input.

    Raises:
        CfusionError: As `fan_out`, before anything is started.
    """
    config = _with_absolute_paths(config)
    slides, _ = check_inputs(config)
    yield f"would extract\t{len(slides)} slides in {plan.tasks} shares"
    if plan.executor == "slurm":
        shares = _shares(config, plan, overwrite)
        script, elements = array_script(shares, plan.resources, config.store / "jobs", _SLURM_NAME)
        yield f"would queue\tan array of {elements}\n{script}"


def _shares(config: PreprocessConfig, plan: FanOut, overwrite: bool) -> list[SlideShare]:
    return [SlideShare(config, number, plan.tasks, overwrite) for number in range(plan.tasks)]


def _dispatch(shares: Sequence[SlideShare], plan: FanOut, store: Path) -> Iterator[ShareResult]:
    if plan.executor == "slurm":
        return run_slurm(shares, plan.resources, store / "jobs", _SLURM_NAME, _no_tick)
    store.mkdir(parents=True, exist_ok=True)
    return run_ray(shares, plan.resources, plan.address, _no_tick, store)


def _no_tick(_waiting: Sequence[SlideShare]) -> None:
    """Do nothing: only results advance the bar."""


def _raise_if_not_done(results: Sequence[ShareResult], tasks: int, attempts: int) -> None:
    for result in results:
        if result.error is not None:
            raise result.error
    done = sum(result.summary is not None for result in results)
    if len(results) < tasks or any(result.stopped for result in results):
        raise RequeueError(
            f"Asked to stop: {done} of {tasks} shares are finished; finished slides of the rest are kept.",
            "The same command resumes.",
        )
    lost = [result for result in results if result.cause]
    if lost:
        names = ", ".join(result.name.removeprefix("share ") for result in lost)
        raise DataError(
            f"{len(lost)} of {tasks} shares were lost in each of {attempts} attempts ({names}): {lost[0].cause}.",
            "See the executor's logs. The same command does the rest.",
        )


def _with_absolute_paths(config: PreprocessConfig) -> PreprocessConfig:
    """Make the configuration independent of the folder in which a task starts."""
    paths = {name: value.absolute() for name, value in config if isinstance(value, Path)}
    return config.model_copy(update=paths)


def merge_summaries(store: Path, parts: Sequence[Summary]) -> Summary:
    """Merge the shares' summaries, and replace their tables by one `summary.csv`."""
    outcomes: list[SlideOutcome] = sorted((o for part in parts for o in part.outcomes), key=lambda o: o.path)
    table = write_summary(store / "summary.csv", outcomes)
    for part in parts:
        if part.table != table:
            part.table.unlink(missing_ok=True)
    seconds = max(part.seconds for part in parts)
    busy = sum(part.seconds * (1 - part.encoder_idle) for part in parts)
    idle = 1 - busy / max(1e-9, sum(part.seconds for part in parts))
    return Summary(tuple(outcomes), seconds, sum(part.pixels for part in parts), idle, table)
