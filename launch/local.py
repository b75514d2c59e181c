"""Run a plan on this machine: a pool of worker processes, each of which keeps its imports between runs.

A run that raises is told with its cause and does not stop the others; a worker that is killed takes its run down with
it, and that run is tried again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from cfusion.console import Progress, progress
from cfusion.errors import CfusionError, PartialResultError
from launch.plan import PlannedRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A run that did not finish, and why, in one line."""

    name: str
    cause: str


def run_all(runs: Sequence[PlannedRun], *, slots: int, retries: int = 1) -> None:
    """Do the runs that are not done, `slots` at a time.

    Args:
        runs: Of `launch.plan.plan`.
        slots: Worker processes; the machine's cores are shared out among them.
        retries: How often a run whose worker was killed is tried again.

    Raises:
        PartialResultError: Some runs failed; each is named with its cause.
    """
    from cfusion.crossval import is_done

    waiting = {run.name: run for run in runs if not is_done(run.config.output)}
    if len(waiting) < len(runs):
        logger.info("%d of %d runs are done already", len(runs) - len(waiting), len(runs))
    failures: list[Failure] = []
    folds = sum(run.config.splits.folds * run.config.splits.repeats for run in waiting.values())
    with progress(f"training {len(waiting)} runs, folds", folds) as bar:
        for attempt in range(retries + 1):
            killed = _pool(list(waiting.values()), slots, bar, failures)
            waiting = {name: run for name, run in waiting.items() if name in killed}
            if not waiting:
                break
            if attempt < retries:
                logger.warning("a worker was killed; trying %s again", ", ".join(waiting))
    failures += [Failure(name, "its worker process was killed, out of memory perhaps") for name in waiting]
    if failures:
        told = "; ".join(f"{failure.name}: {failure.cause}" for failure in failures)
        raise PartialResultError(f"{len(failures)} of {len(runs)} runs failed. {told}", "See run.log in their folders.")


def _pool(runs: list[PlannedRun], slots: int, bar: Progress, failures: list[Failure]) -> set[str]:
    """Run once each; returns the names of those whose worker was killed."""
    threads = max(1, usable_cores() // slots)
    killed: set[str] = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(slots, mp_context=context, initializer=_start_worker, initargs=(threads,)) as pool:
        pending: dict[Future[str | None], PlannedRun] = {pool.submit(_work, run): run for run in runs}
        counted = 0
        while pending:
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                run = pending.pop(future)
                try:
                    cause = future.result()
                except BrokenProcessPool:
                    killed.add(run.name)
                    continue
                if cause is not None:
                    failures.append(Failure(run.name, cause))
            finished = sum(len(list(run.config.output.glob("*fold_*/fold.json"))) for run in runs)
            bar.advance(finished - counted)
            counted = finished
    return killed


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has where a scheduler has bound it to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _work(run: PlannedRun) -> str | None:
    """Do one run in a worker; returns the cause where it fails."""
    from cfusion.crossval import cross_validate

    folder = run.config.output
    folder.mkdir(parents=True, exist_ok=True)
    log = logging.FileHandler(folder / "run.log")
    root = logging.getLogger("cfusion")
    root.setLevel(logging.INFO)
    root.addHandler(log)
    started = time.monotonic()
    try:
        cross_validate(run.config)
        root.info("done in %.0f s", time.monotonic() - started)
    except CfusionError as error:
        root.error("%s", error)
        return str(error)
    except Exception as error:  # noqa: BLE001 - a worker tells its cause whatever it is; the sweep then fails
        root.error("%s", traceback.format_exc())
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        root.removeHandler(log)
        log.close()
    return None
