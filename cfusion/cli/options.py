"""Options that several commands share, and options that only some executors take."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated

import typer

from cfusion.errors import ConfigError, nearest

TrustCode = Annotated[
    str | None,
    typer.Option(metavar="DIGEST", help="Run code that came with the model if its SHA-256 begins with this."),
]

Executor = Annotated[str, typer.Option(help="local, slurm (job array) or ray (cluster).")]
Retries = Annotated[int, typer.Option(help="Further attempts at work that was killed.", min=0)]
Partition = Annotated[str, typer.Option(help="slurm: partition.")]
Hours = Annotated[
    float, typer.Option(help="slurm: time limit of a task; shortly before it the task is queued again.", min=0.1)
]
Cpus = Annotated[int, typer.Option(help="slurm, ray: cores of a task.", min=1)]
Gpus = Annotated[int, typer.Option(help="slurm, ray: GPUs of a task.", min=0)]
Mem = Annotated[float | None, typer.Option(help="slurm: memory of a task in GB.", min=0.1)]
MaxParallel = Annotated[int | None, typer.Option(help="slurm, ray: maximum number of tasks at the same time.", min=1)]
Chunk = Annotated[int, typer.Option(help="slurm: tasks that one array element does one after another.", min=1)]
RayAddress = Annotated[str, typer.Option(help="ray: auto, HOST:6379, ray://HOST:10001, or local.")]

TASK_OPTIONS: Mapping[str, frozenset[str]] = {
    "slurm": frozenset({"partition", "hours", "cpus", "gpus", "mem", "max_parallel", "chunk"}),
    "ray": frozenset({"cpus", "gpus", "max_parallel", "ray_address"}),
}
"""Of the options above, those that only these executors take."""


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
