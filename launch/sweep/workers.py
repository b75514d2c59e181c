"""Run jobs on this machine in worker processes, each with its cores and GPUs; they keep their imports between runs.

A worker that is killed ends only its own run; another worker replaces it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cfusion.child_processes import forked_context, stop_with_parent
from cfusion.errors import ConfigError
from cfusion.interruption import stop_requested
from cfusion.machine_limits import GPU_SHARE, SLOTS, free_memory_bytes, usable_cores
from launch.sweep.work import Job, Outcome

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.5
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Slot:
    """A place for one worker.

    Attributes:
        threads: Cores.
        gpus: Its GPUs as in `CUDA_VISIBLE_DEVICES`; None: all GPUs of the machine.
        share: Fraction of each of these GPUs that it may fill.
    """

    threads: int
    gpus: str | None = None
    share: float = 1.0


def slots_here(slots: int | None, slots_per_gpu: int, processes: int) -> list[Slot]:
    """Return the slots of this machine: `slots`, assigned to its GPUs in turn, or as many as its GPUs hold, or one.

    Args:
        slots: How many; None: `slots_per_gpu` for each GPU, or for each group of `processes` GPUs. They share the
            cores equally; OMP_NUM_THREADS, if set, limits the threads of each.
        slots_per_gpu: Workers on one GPU, each with an equal share of its memory.
        processes: Processes of a run, each with a separate GPU if there are GPUs.

    Raises:
        ConfigError: A run asks for more GPUs than there are.
    """
    gpus = visible_gpus()
    if gpus and len(gpus) < processes:
        raise ConfigError(f"--processes {processes}: this machine shows {len(gpus)} GPUs.", "Ask for fewer.")
    groups = [",".join(gpus[i : i + processes]) for i in range(0, len(gpus) - processes + 1, processes)]
    count = slots or max(1, len(groups) * slots_per_gpu)
    threads = max(1, usable_cores() // count)
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        threads = min(threads, max(1, int(os.environ["OMP_NUM_THREADS"])))
    if not groups:
        return [Slot(threads)] * count
    share = 1 / math.ceil(count / len(groups))
    return [Slot(threads, groups[i % len(groups)], share) for i in range(count)]


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return names if torch.cuda.is_available() else []


def run_local(jobs: Sequence[Job], slots: Sequence[Slot], tick: Callable[[Sequence[Job]], None]) -> Iterator[Outcome]:
    """Do the jobs, one per slot at a time.

    Args:
        jobs: What to do.
        slots: Where.
        tick: Called regularly with the running jobs.

    Yields:
        How each run went, when it ends. After a request to stop (see `cfusion.interruption`) running runs save their
        state and end as `stopped`; the rest is not started.
    """
    _warn_of_memory(jobs, len(slots))
    waiting = deque(jobs)
    taken = slots[: len(jobs)]
    workers = [_Worker(slot, len(taken)) for slot in taken]
    stopping = False
    try:
        while True:
            if stop_requested() and not stopping:
                stopping = True
                waiting.clear()
                for worker in workers:
                    worker.stop()
            for worker in workers:
                if waiting and worker.job is None:
                    worker.start(waiting.popleft())
            busy = {worker.ready: worker for worker in workers if worker.job is not None}
            if not busy:
                return
            for ready in wait(list(busy), timeout=_TICK_SECONDS):
                yield from busy[ready].finish(stopping)  # type: ignore[index]
            tick([worker.job for worker in workers if worker.job is not None])
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.close()


class _Worker:
    """A process that does one job after another; it starts with its first job, and again after it was killed.

    Args:
        slot: Its place.
        slots: Workers on this machine.
    """

    def __init__(self, slot: Slot, slots: int) -> None:
        self.job: Job | None = None
        self._slot, self._slots = slot, slots
        self._process: Any = None
        self._pipe: Connection | None = None

    @property
    def ready(self) -> Connection:
        """Readable when the job has ended in any way."""
        assert self._pipe is not None
        return self._pipe

    def start(self, job: Job) -> None:
        if self._process is None or not self._process.is_alive():
            context = forked_context()  # one import for all slots
            self._pipe, other = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(other, self._slot, {**os.environ, SLOTS: str(self._slots)})
            )
            self._process.start()
            other.close()
        self.job = Job(job.runs, job.processes, self._slot.share)
        with contextlib.suppress(BrokenPipeError):  # it has just been killed; `finish` reports that
            self.ready.send(self.job)

    def finish(self, stopping: bool) -> list[Outcome]:
        """Return the outcomes of the job that has ended."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return self.ready.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            cause = f"its worker process was killed by signal {-code}" if code < 0 else f"its worker exited with {code}"
            return job.lost(cause + ", possibly out of memory" * (-code == signal.SIGKILL), stopped=stopping)

    def stop(self) -> None:
        """Ask the running job, if any, to save its state and end."""
        if self.job is not None:
            self._process.terminate()

    def close(self) -> None:
        """End the process after it has reported how its job went."""
        if self._process is None:
            return
        if self.job is not None and self.ready.poll(_GRACE_SECONDS):
            self.finish(stopping=True)
        self.ready.close()
        self._process.join(_GRACE_SECONDS)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, slot: Slot, environment: dict[str, str]) -> None:
    """Serve jobs until the sweep closes the pipe or is gone. Only the sweep handles Ctrl-C."""
    stop_with_parent(os.getppid())  # the server, which ends with the sweep
    sweep = multiprocessing.parent_process()
    if sweep is None or not sweep.is_alive():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()  # the server has that of the sweep's first worker
    os.environ.update(environment | {"OMP_NUM_THREADS": str(slot.threads), GPU_SHARE: str(slot.share)})
    if slot.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpus
    import threadpoolctl
    import torch

    threadpoolctl.threadpool_limits(slot.threads)  # BLAS has read the variable before it was set
    torch.set_num_threads(slot.threads)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        outcomes = job()
        try:
            pipe.send(outcomes)
        except BrokenPipeError:  # the sweep was killed; the run's folder says how far it came
            return


def _warn_of_memory(jobs: Sequence[Job], slots: int) -> None:
    ahead = max((run.config.data.buffer_bytes for job in jobs for run in job.runs), default=0)
    available = free_memory_bytes()
    if ahead * min(slots, len(jobs)) > available:
        logger.warning(
            "%d runs at a time may read %.1f GB ahead (data.buffer_bytes each), %.1f GB of memory are free",
            slots, ahead * slots / 1e9, available / 1e9,
        )  # fmt: skip
