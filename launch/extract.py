"""Fan-out: the same extraction on this node, as a SLURM job array, or on a Ray cluster.

Every task takes one of equal shares of the sorted slides. Work is idempotent, so a task that was killed is started
again and does what is left; no lock is held that a crash could leave behind.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cfusion.errors import CfusionError, ConfigError, DataError, MissingExtraError
from preprocess.extraction import preprocess_slides
from preprocess.outcome import SlideOutcome, Summary, write_summary
from preprocess.settings import PreprocessConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FanOut:
    """How the work is spread.

    Attributes:
        executor: `local`: this process, its threads and GPUs; `slurm`: a job array; `ray`: tasks on a Ray cluster.
        tasks: Equal shares of the slides, each a task.
        gpus: GPUs of one task.
        minutes: Time limit of a SLURM task.
        partition: SLURM partition; empty: the cluster's default.
        attempts: How often a share is started before it counts as lost.
    """

    executor: Literal["local", "slurm", "ray"] = "local"
    tasks: int = 1
    gpus: int = 0
    minutes: int = 24 * 60
    partition: str = ""
    attempts: int = 3


def fan_out(config: PreprocessConfig, plan: FanOut, *, overwrite: bool = False) -> Summary:
    """Extract all slides of `config` on the executor of `plan`, and wait.

    Raises:
        CfusionError: See `preprocess_slides`.
        DataError: A share was lost `plan.attempts` times.
        MissingExtraError: The executor's package is not installed.
    """
    if plan.tasks < 1 or plan.attempts < 1:
        raise ConfigError(f"tasks={plan.tasks}, attempts={plan.attempts}: expected at least 1.")
    if plan.executor == "local" and plan.tasks == 1:
        return preprocess_slides(config, overwrite=overwrite)
    config = _with_whole_paths(config)
    shares = [(number, plan.tasks) for number in range(plan.tasks)]
    run = {"local": _here, "slurm": _on_slurm, "ray": _on_ray}[plan.executor]
    parts: dict[tuple[int, int], Summary] = {}
    for attempt in range(1, plan.attempts + 1):
        left = [share for share in shares if share not in parts]
        for share, result in zip(left, run(config, plan, left, overwrite), strict=True):
            if isinstance(result, Summary):
                parts[share] = result
            elif isinstance(result, CfusionError):
                raise result
            else:
                logger.warning("share %d of %d was lost, attempt %d: %s", *share, attempt, result)
        if len(parts) == len(shares):
            return merge_summaries(config.store, [parts[share] for share in shares])
    lost = [f"{n}/{of}" for n, of in shares if (n, of) not in parts]
    raise DataError(f"the shares {', '.join(lost)} were lost {plan.attempts} times.", "See the executor's logs.")


def _with_whole_paths(config: PreprocessConfig) -> PreprocessConfig:
    """The same configuration from wherever a task may start: a Ray worker has a working folder of its own."""
    paths = {name: value.absolute() for name, value in config if isinstance(value, Path)}
    return config.model_copy(update=paths)


def merge_summaries(store: Path, parts: Sequence[Summary]) -> Summary:
    """One summary of all shares, and one `summary.csv` in place of theirs."""
    outcomes: list[SlideOutcome] = sorted((o for part in parts for o in part.outcomes), key=lambda o: o.path)
    table = write_summary(store / "summary.csv", outcomes)
    for part in parts:
        if part.table != table:
            part.table.unlink(missing_ok=True)
    seconds = max(part.seconds for part in parts)
    busy = sum(part.seconds * (1 - part.encoder_idle) for part in parts)
    idle = 1 - busy / max(1e-9, sum(part.seconds for part in parts))
    return Summary(tuple(outcomes), seconds, sum(part.pixels for part in parts), idle, table)


def _task(config: PreprocessConfig, share: tuple[int, int], overwrite: bool) -> Summary | CfusionError:
    """One share; an error of the user's comes back as a value, so that no executor wraps or retries it."""
    try:
        return preprocess_slides(config, share=share, overwrite=overwrite)
    except CfusionError as error:
        return error


def _here(config: PreprocessConfig, plan: FanOut, shares: list[tuple[int, int]], overwrite: bool) -> list[Any]:
    return [_task(config, share, overwrite) for share in shares]


def _on_slurm(config: PreprocessConfig, plan: FanOut, shares: list[tuple[int, int]], overwrite: bool) -> list[Any]:
    return run_submitit(config, plan, shares, overwrite, cluster="slurm")


def run_submitit(
    config: PreprocessConfig, plan: FanOut, shares: list[tuple[int, int]], overwrite: bool, cluster: str
) -> list[Any]:
    """Run shares as a job array of submitit's `cluster`, `slurm` or `local`; a task that was lost gives its error."""
    if importlib.util.find_spec("submitit") is None:
        raise MissingExtraError("submitit", "slurm", "--executor slurm")
    import submitit

    if cluster == "slurm" and shutil.which("srun") is None:
        raise ConfigError("--executor slurm: there is no srun here.", "Run it where jobs are submitted.")
    executor = submitit.AutoExecutor(folder=config.store / "jobs", cluster=cluster)
    executor.update_parameters(
        name="cfusion-preprocess", timeout_min=plan.minutes, cpus_per_task=config.threads + 1,
        gpus_per_node=plan.gpus, slurm_array_parallelism=len(shares),
        **({"slurm_partition": plan.partition} if plan.partition else {}),
    )  # fmt: skip
    with executor.batch():
        jobs = [executor.submit(_task, config, share, overwrite) for share in shares]
    results: list[Any] = []
    for job in jobs:
        try:
            results.append(job.result())
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            results.append(str(error).splitlines()[0])
    return results


def _on_ray(config: PreprocessConfig, plan: FanOut, shares: list[tuple[int, int]], overwrite: bool) -> list[Any]:
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "--executor ray")
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError as error:
            raise DataError("--executor ray: there is no Ray cluster here.", "Start one: ray start --head.") from error
    task = ray.remote(num_cpus=config.threads, num_gpus=plan.gpus, max_retries=plan.attempts - 1)(_task)
    results: list[Any] = []
    for future in [task.remote(config, share, overwrite) for share in shares]:
        try:
            results.append(ray.get(future))
        except ray.exceptions.RayError as error:
            results.append(str(error).splitlines()[0])
    return results
