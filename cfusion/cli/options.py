"""Options that several commands share, and options that only some executors take."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Annotated

import typer

from cfusion.errors import ConfigError, nearest

if TYPE_CHECKING:
    from launch.tasks.slurm_options import SlurmQueueOptions

TrustCode = Annotated[
    str | None,
    typer.Option(metavar="DIGEST", help="Run code that came with the model if its SHA-256 begins with this."),
]

Executor = Annotated[str, typer.Option(help="local, slurm (job array) or ray (cluster).")]
Retries = Annotated[int, typer.Option(help="Further attempts at work that was killed.", min=0)]
Partition = Annotated[str | None, typer.Option(help="slurm: partition.")]
Account = Annotated[str | None, typer.Option(help="slurm: account that is charged.")]
Qos = Annotated[str | None, typer.Option(help="slurm: quality of service.")]
Constraint = Annotated[str | None, typer.Option(help="slurm: features that a node must have.")]
Exclusive = Annotated[bool, typer.Option("--exclusive", help="slurm: nodes that no other job shares.")]
Sbatch = Annotated[
    list[str] | None, typer.Option(help="slurm: further option of sbatch, KEY=VALUE or KEY; may be repeated.")
]
Setup = Annotated[list[str] | None, typer.Option(help="slurm: line of shell to run first, such as: module load cuda.")]
Hours = Annotated[
    float, typer.Option(help="slurm: time limit of a task; shortly before it the task is queued again.", min=0.1)
]
Cpus = Annotated[
    int | None, typer.Option(help="slurm, ray: cores of a task; default: 4, or those of the largest node.", min=1)
]
Gpus = Annotated[int, typer.Option(help="slurm, ray: GPUs of a task.", min=0)]
Mem = Annotated[float | None, typer.Option(help="slurm: memory of a task in GB.", min=0.1)]
MaxParallel = Annotated[int | None, typer.Option(help="slurm, ray: maximum number of tasks at the same time.", min=1)]
Chunk = Annotated[int, typer.Option(help="slurm: tasks that one array element does one after another.", min=1)]
RayAddress = Annotated[str, typer.Option(help="ray: auto, HOST:6379, ray://HOST:10001, or local.")]

TASK_OPTIONS: Mapping[str, frozenset[str]] = {
    "slurm": frozenset({
        "partition", "account", "qos", "constraint", "exclusive", "sbatch", "setup", "hours", "cpus", "gpus", "mem",
        "max_parallel", "chunk",
    }),
    "ray": frozenset({"cpus", "gpus", "max_parallel", "ray_address"}),
}  # fmt: skip
"""Of the options above, those that only these executors take."""


DEFAULT_CORES = 4


def queue_options(
    executor: str, partition: str | None, account: str | None, qos: str | None, constraint: str | None, exclusive: bool,
    sbatch: list[str] | None, setup: list[str] | None,
) -> SlurmQueueOptions:  # fmt: skip
    """Return the options of SLURM from the command line, over those of the site's profile."""
    from launch.tasks.slurm_options import SlurmQueueOptions, parse_sbatch

    if executor != "slurm":
        return SlurmQueueOptions()
    return SlurmQueueOptions(
        partition, account, parse_sbatch(sbatch or []), tuple(setup or ()), qos=qos, constraint=constraint,
        exclusive=exclusive,
    ).over_profile()  # fmt: skip


def cores_of(cpus: int | None, executor: str, slurm: SlurmQueueOptions) -> int:
    """Return the cores of a task: as given, or the default, which must fit a node."""
    from launch.tasks.slurm_options import most_cores

    if cpus is not None:
        return cpus
    most = most_cores(slurm.partition) if executor == "slurm" else None
    return min(DEFAULT_CORES, most or DEFAULT_CORES)


def refuse_unheard(context: typer.Context, executor: str, takes: Mapping[str, Set[str]]) -> None:
    """Refuse options that the chosen executor would ignore.

    Args:
        context: The command's context.
        executor: The chosen executor.
        takes: Executor → parameters that it takes and not every executor does.

    Raises:
        ConfigError: The executor is unknown, or an option was given that it does not take.
    """
    if executor not in takes:
        raise ConfigError(f"--executor {executor}: expected one of {', '.join(takes)}.", nearest(executor, takes))
    for parameter in context.command.params:
        name = str(parameter.name)
        others = [other for other, names in takes.items() if name in names]
        if others and executor not in others and given(context, name):
            raise ConfigError(
                f"{parameter.opts[0]} does not go with --executor {executor}.",
                f"Leave it out, or give --executor {' or '.join(others)}.",
            )


def given(context: typer.Context, parameter: str) -> bool:
    """Return whether a parameter stands on the command line."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"
